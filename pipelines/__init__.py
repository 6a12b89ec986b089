"""The workflow: recipes, the DAG, its steps and the command line."""
