"""The private names of other libraries that this package reads, calls, sets or overrides: all of them.

`tests/test_private_names.py` finds each in the installed releases, and no other one in the package. A new one is added here:
the class (`module:Class`) or module that has it, of a base class if it is overridden; below it names, the files below `nlgmoe/`
that use them, and what for; the public way that is missing. Names of DeepSpeed's optimizer that have no underscore, but no
documentation either, are listed too.
"""

_LIST = """
torch._C._distributed_c10d
    _resolve_process_group | tools/planner/simulate.py | the group of a collective by its name; a public getter
torch.testing._internal.distributed.fake_pg
    FakeStore | tools/planner/simulate.py | a group whose collectives do nothing; a public fake group
torch.utils._python_dispatch
    TorchDispatchMode | tools/planner/simulate.py | see every operator; a public mode
torch.utils._pytree
    tree_iter | tools/planner/simulate.py | tensors of arguments and results; a public walk
torch.ops:aten
    _local_scalar_dense | tools/planner/simulate.py | a read by the host; an event
torch.ops:_c10d_functional
    all_to_all_single | tools/planner/simulate.py | an all-to-all; a public name of the operator
torch.ops:c10d
    _allgather_base_ | tools/planner/simulate.py | a gather; a public name of the operator
torch:UntypedStorage
    _cdata | tools/planner/simulate.py | a storage's identity; a property
torch:ScriptObject
    _type | tools/planner/simulate.py | whether an argument is a process group; a public type
lightning.pytorch.loops.fit_loop:_FitLoop
    _should_accumulate | run/resume.py | whether a micro-batch ends a step; a property
    _data_source | module.py | the data module of this fit; `datamodule` is kept from an earlier call
    _data_fetcher | run/resume.py | argument of `_should_check_val_fx`; a property of the loop
lightning.pytorch.loops.training_epoch_loop:_TrainingEpochLoop
    _should_check_val_fx | run/resume.py | whether a step is validated; a property
    _is_training_done | run/save_checkpoints.py | whether a validation is the last one; a property
    _batches_that_stepped | module.py step.py callbacks/expert_load.py | the loggers' step, see `run/resume.py`; a setter
    _broadcast_sigterm_tensor | run/signals.py | replaced: it blocks in every micro-batch; a trainer without signals
    _results | callbacks/staged_distillation.py | forget the distillation losses; `unlog`
lightning.pytorch.trainer.connectors.logger_connector.logger_connector:_LoggerConnector
    _callback_metrics _logged_metrics | callbacks/staged_distillation.py | forget the distillation losses; `unlog`
    _progress_bar_metrics | callbacks/staged_distillation.py | forget the distillation losses; `unlog`
lightning.pytorch.trainer.trainer:Trainer
    _logger_connector | run/folder.py callbacks/staged_distillation.py | is this step logged; forget losses; `unlog`
    _signal_connector | run/signals.py | its `register_signal_handlers`, replaced: they deadlock; a trainer without signals
    _accelerator_connector | run/signals.py | Slurm's requeue signal; the cluster environment of the trainer
    _default_root_dir | run/trainer.py | a temporary folder for `fast_dev_run`; a setter of `default_root_dir`
    _run | run/trainer.py | overridden: agree on what to resume; a hook between ranks' start and prepare_data
lightning.pytorch.trainer.setup:trainer
    _val_check_time_interval | run/checks.py | refuse `val_check_interval` as a time; `Trainer.val_check_interval` is None then
lightning.pytorch.core.module:LightningModule
    _trainer | module.py step.py | whether there is a trainer; `trainer` raises without one
lightning.pytorch.callbacks.timer:Timer
    _duration | run/resume.py | a timer with an end; `duration`
    _check_time_remaining | run/resume.py | ask it again after a strategy has loaded its state; a public check
lightning.pytorch.callbacks.progress.tqdm_progress:TQDMProgressBar
    _should_update | callbacks/progress.py | overridden: fewer lines in a file; a refresh rate in seconds
lightning.fabric.loggers.csv_logs:_ExperimentWriter
    _check_log_dir_exists | run/folder.py | overridden: continue an existing table; a CSV logger that appends
    _rewrite_with_new_header | run/folder.py | overridden: never empty the file; a CSV logger that appends
lightning.fabric.loggers.csv_logs:CSVLogger
    _experiment | run/folder.py | set to the writer above; a CSV logger that appends
lightning.pytorch.loggers.wandb:WandbLogger
    _log_model | run/checks.py | refuse its upload; `log_model`
lightning.pytorch.strategies.launchers.subprocess_script
    _SubprocessScriptLauncher | parallel/strategy.py run/signals.py | the processes that this one has started; a public class
lightning.pytorch.strategies.deepspeed:DeepSpeedStrategy
    _setup_model_and_optimizer | parallel/strategy.py | overridden: a device without an index; a hook
    _initialize_deepspeed_train | parallel/strategy.py | overridden: mark the experts first; a hook
    _initialize_deepspeed_inference | parallel/strategy.py | overridden: no engine to evaluate; a hook
    _init_deepspeed_distributed | parallel/strategy.py | on CPUs too; `setup_distributed` for CPUs
    _process_group_backend | parallel/strategy.py | gloo on CPUs; `setup_distributed` for CPUs
lightning.pytorch.plugins.precision.deepspeed:DeepSpeedPrecision
    _desired_dtype | parallel/strategy.py | the weights' type; a property
deepspeed.utils.groups
    _WORLD_GROUP _EXPERT_PARALLEL_GROUP _EXPERT_PARALLEL_GROUP_RANKS | parallel/engine.py | groups with a timeout; a setter
    _EXPERT_DATA_PARALLEL_GROUP _EXPERT_DATA_PARALLEL_GROUP_RANKS | parallel/engine.py | groups with a timeout; a setter
    _get_data_parallel_group _get_expert_data_parallel_group | parallel/engine.py | the ranks of a parameter; a public getter
deepspeed.utils.mixed_precision_linkage:lp_param
    _hp_mapping _index_in_param_group | parallel/engine.py | a rank's part of weights and moments; by name
deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer
    _hp_optimizer_states_linked _lazy_init_hp_params_optimizer_state | parallel/engine.py | link moments again; a public call
    _wait_for_offload_copies | parallel/engine.py | before gradients are read; a public call
    bit16_groups | parallel/engine.py | the parameters of each flat group; a mapping by parameter
    single_partition_of_fp32_groups | parallel/engine.py | their flat values; a mapping by parameter
    scaled_global_norm | parallel/engine.py | replaced: the norm of this step; an argument
    check_grad_overflow | parallel/engine.py | set: heed the norm in bf16; a setting
    check_overflow | parallel/engine.py | replaced: the norm shows it; a setting
    _update_scale | parallel/engine.py | replaced in bf16: only warns; a setting
deepspeed.ops
    __compatible_ops__ | parallel/engine.py | set: no extension is compiled; a setting
torch.distributed._functional_collectives
    all_to_all_single_autograd | layers/all_to_all.py | an all-to-all with a backward pass that does not wait at once
torch
    _C | tools/planner/simulate.py | the group of a collective by its name; a public getter
    _foreach_norm | non_finite.py | norms in fp32 without copies; a type of `get_total_norm`
    _foreach_mul_ | non_finite.py | scale many gradients in one kernel; `clip_grads_with_norm_` rounds
torch.optim.adam:Adam
    _step_supports_amp_scaling | optim/optimizer.py | set: the scaler unscales, so that Lightning can clip
torch.nn:Module
    _apply _buffers | layers/router.py | overridden: buffers keep their type; a type that stays
    _non_persistent_buffers_set | checkpoint/entries.py | refuse buffers that no checkpoint holds; a public name
torch.testing._internal.distributed
    fake_pg | parallel/expert_groups.py | groups that only name ranks; a public backend that sends nothing
argparse:ArgumentParser
    _actions | cli/type_hints.py cli/train.py | the settings of a parser, to check names before it parses; a list
jsonargparse._typehints:ActionTypeHint
    _typehint | cli/type_hints.py cli/train.py | the types of settings; `type` is None for a type hint
lm_eval.api.task:Task
    _metric_fn_list | tools/lm_eval/harness.py | the metrics of a task; a getter
transformers.modeling_utils:PreTrainedModel
    _is_hf_initialized | tools/hugging_face/modeling_nlgmoe.py | keep our initial weights; a flag
    _init_weights | tools/hugging_face/modeling_nlgmoe.py | overridden, as documented
    _no_split_modules | tools/hugging_face/modeling_nlgmoe.py | set, as documented
    _supports_sdpa _tied_weights_keys | tools/hugging_face/modeling_nlgmoe.py | set, as other models do
transformers.configuration_utils:PreTrainedConfig
    _experts_implementation | tools/check/foreign.py | the experts' product of a block alone; a setting of a block
"""

PRIVATE_NAMES: dict[str, dict[str, tuple[str, str]]] = {}  # owner -> name -> files, reason
_owner = ""
for _line in _LIST.strip().splitlines():
    if _line.startswith(" "):
        _names, _files, _reason = (field.strip() for field in _line.split("|"))
        PRIVATE_NAMES[_owner] |= dict.fromkeys(_names.split(), (_files, _reason))
    else:
        _owner = _line
        PRIVATE_NAMES[_owner] = {}
