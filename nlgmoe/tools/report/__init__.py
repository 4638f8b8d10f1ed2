"""`nlgmoe report`: an HTML page about one or several runs.

`runs.py` reads run folders; `figures.py`, `specialisation_figures.py` and `groups.py` draw; `page.py` assembles. A report needs
only the files of run folders, no data or checkpoint.
"""
