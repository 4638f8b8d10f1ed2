from pathlib import Path

CUT = Path(__file__).with_name("smollm2_cut.gguf")
