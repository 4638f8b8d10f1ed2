"""train.py with the environment's fault waiting in it; see `fault.py`. Its arguments are train.py's.

Lightning starts further ranks by the name of this script, so each of them arms itself.
"""

from tests.faults.fault import arm

if __name__ == "__main__":
    arm()  # before anything is imported that the fault could happen in
    from nlgmoe.cli.train import main

    main()
