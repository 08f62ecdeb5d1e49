"""Our exports next to other runtimes, on the same model, text and machine.

Every runtime is a child process of its own (`child.py`), which holds one loaded model and measures
its own times; the parent (`runner.py`) asks one after another, round by round. `variants.py` is the
table of what is compared, `artefacts.py` writes the files they run, `environments.py` fetches the
runtimes that this package does not depend on, and `report.py` and `bars.py` show the figures.
"""
