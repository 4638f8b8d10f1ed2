"""`nlgmoe report`: one page about one run or several. `runs.py` reads run folders, `*_figures.py` draw, `page.py` joins it all.

Nothing here needs torch, data or a checkpoint: all of it is made of the files in run folders.
"""
