"""Memory and communication of a run by arithmetic, before it is started: `nlgmoe inspect`."""
