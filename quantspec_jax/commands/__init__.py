"""The commands of `quantspec`, a file each.

Every one has `add(commands)`, which adds its parser, and `run(args)`, which returns what --json
prints. Heavy packages are imported where they are needed, so that wrong arguments answer at once.
"""
