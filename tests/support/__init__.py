"""What tests and benchmarks share, one module a topic; it imports no test and no benchmark."""
