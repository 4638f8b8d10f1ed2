"""Other systems, planning and reports. The core does not import it."""
