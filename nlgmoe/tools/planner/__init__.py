"""Memory and step time of a run by arithmetic, before it is started: `nlgmoe inspect`."""
