"""`nlgmoe report`: an HTML page about one or several runs.

`runs.py` reads run folders, `figures.py` and `specialisation_figures.py` draw, `groups.py` compares, `page.py` assembles. A report
needs only the files of run folders, without torch, data or a checkpoint.
"""
