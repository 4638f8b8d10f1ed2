"""`nlgmoe report`: an HTML page about one or several runs. `runs.py` reads run folders, `*_figures.py` draw, `page.py` assembles.

A report needs only the files of run folders, without torch, data or a checkpoint.
"""
