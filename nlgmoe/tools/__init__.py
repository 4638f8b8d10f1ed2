"""Other systems, planning and reports. Outside this folder only the command line's table imports it."""
