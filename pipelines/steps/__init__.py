"""One file per stage of the DAG; each imports its heavy dependencies inside `run`."""
