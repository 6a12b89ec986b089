"""Three nodes of Ray on this machine, in a process of their own, for `rays`.

Prints {"address", "gcs", "raylets"} and then obeys lines on stdin: "add" for another node.
"""

import json
import sys

from ray.cluster_utils import Cluster


def main() -> None:
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 2,
            "include_dashboard": True,
            "gcs_server_port": int(sys.argv[1]),
            "dashboard_port": int(sys.argv[2]),
        },
    )
    nodes = [cluster.head_node, *(cluster.add_node(num_cpus=2) for _ in range(2))]
    cluster.wait_for_nodes()
    _tell(cluster, nodes)
    for line in sys.stdin:
        if line.strip() == "add":
            nodes.append(cluster.add_node(num_cpus=2))
            _tell(cluster, nodes)


def _tell(cluster: Cluster, nodes: list[object]) -> None:
    raylets = [_pid(node, "raylet") for node in nodes]
    said = {"address": cluster.address, "gcs": _pid(nodes[0], "gcs_server"), "raylets": raylets}
    print(json.dumps(said), flush=True)


def _pid(node: object, what: str) -> int:
    return int(node.all_processes[what][0].process.pid)  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
