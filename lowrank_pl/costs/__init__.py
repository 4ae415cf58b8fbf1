"""What a run will need, predicted for ``--dry_run``, and how fast things are, measured for ``lowrank bench``."""
