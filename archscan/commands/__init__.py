"""The commands, one file each: parser → options → pipeline → printed report.

Each file has ``make_parser()`` and ``run(parsed, command_line)``, and imports nothing heavy before ``run``.
"""
