"""Cut SmolLM2-135M-Instruct to a GGUF file of 2 MB: `python -m tests.real.make SmolLM2-135M-Instruct.Q4_1.gguf`.

Kept are 4 blocks, the first 2,000 of 49,152 tokens, and in each block 3 of 9 heads and 96 of 1,536 inner values. Blocks of the
file's quantisation (32 values of a row) are copied byte for byte; the token embedding is quantised anew, from Q8_0 to Q4_1.
"""

import sys

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize, quantize

from tests.real import CUT

BLOCKS, TOKENS, HEADS, INNER = 4, 2000, 3, 96
HEAD, HIDDEN = 64, 576
ROWS = {"attn_q": HEADS * HEAD, "attn_k": HEAD, "attn_v": HEAD, "ffn_gate": INNER, "ffn_up": INNER}
COLUMNS = {"attn_output": HEADS * HEAD, "ffn_down": INNER}
SETTINGS = {
    "llama.block_count": BLOCKS,
    "llama.feed_forward_length": INNER,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": 1,
    "llama.vocab_size": TOKENS,
}


def main(source: str) -> None:
    reader = GGUFReader(source)
    writer = GGUFWriter(CUT, "llama")
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()[:TOKENS]
    known = set(tokens)
    lists = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": reader.fields["tokenizer.ggml.token_type"].contents()[:TOKENS],
        "tokenizer.ggml.merges": [
            merge for merge in reader.fields["tokenizer.ggml.merges"].contents() if merge.replace(" ", "") in known
        ],
    }
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind = field.types[0]
        if name in lists:
            writer.add_array(name, lists[name])
        elif name == "llama.attention.key_length" or len(field.types) > 1:
            continue
        else:
            writer.add_key_value(name, SETTINGS.get(name, field.contents()), kind)
    # A head of 64 values does not follow from 576 values and 3 heads.
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    for tensor in reader.tensors:
        if tensor.name.startswith("blk.") and int(tensor.name.split(".")[1]) >= BLOCKS:
            continue
        data, kind = np.array(tensor.data), tensor.tensor_type
        part = tensor.name.split(".")[-2]
        if part == "token_embd":
            kind = GGMLQuantizationType.Q4_1
            data = quantize(dequantize(data[:TOKENS], tensor.tensor_type), kind)
        data = data[: ROWS.get(part, len(data))]
        if part in COLUMNS:  # 20 bytes hold 32 values
            assert kind == GGMLQuantizationType.Q4_1
            data = data[:, : COLUMNS[part] // 32 * 20]
        writer.add_tensor(tensor.name, np.ascontiguousarray(data), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(f"{CUT}: {CUT.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
