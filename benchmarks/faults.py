"""Would the tests notice? Faults that other implementations have, and others of their kind, are put in one at a time.

Statistic: for each fault, whether the tests that are meant to catch it fail once it is in.
Pass rule: every fault is caught, and without a fault the same tests pass.

    python benchmarks/faults.py            # ten minutes; writes records/faults.json
    python benchmarks/faults.py average    # only faults in whose description the word occurs

What stands in `FAULTS`: what goes wrong, the file, the code as it is, the code as it would be, the test.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "records" / "faults.json"

FAULTS = [
    (
        "an exception in the merged validation leaves the merge in the model",
        "swap.py",
        "        try:\n            exchange.put_back(for_good=True)\n",
        "        try:\n            pass\n",
        "test_callback.py::test_an_exception_in_the_merged_validation_arrives_and_the_live_weights_are_back",
    ),
    (
        "the average overwrites the trained model at the end of fit",
        "callback.py",
        "        self._explain_phase(trainer, is_end=True)\n",
        "        self._explain_phase(trainer, True)\n        pl_module.load_state_dict(self.merged_state_dict())\n",
        "test_observer.py::test_training_is_bit_identical_with_and_without_the_callback",
    ),
    (
        "the merge is validated before anything was captured",
        "validation.py",
        "        captured = [name for name in merges.rules if merges.is_captured(name)]",
        "        captured = list(merges.rules)",
        "test_callback.py::test_nothing_is_logged_before_the_first_snapshot",
    ),
    (
        "a checkpoint kept by a merged metric holds live weights",
        "checkpoint.py",
        "            self.merge_callback.save_merged(filepath, self.merge)\n",
        "            trainer.save_checkpoint(filepath)\n",
        "test_exports.py::test_merged_checkpoints_keep_the_best_merges_and_live_checkpoints_live_weights",
    ),
    (
        "steps of all optimizers are counted",
        "rates.py",
        "    return trainer.global_step // max(1, len(trainer.optimizers))",
        "    return trainer.global_step",
        "test_callback.py::test_a_step_of_several_optimizers_is_one_round_of_them",
    ),
    (
        "integer buffers are taken from a snapshot",
        "weights.py",
        "        if buffer.is_floating_point() and leaf",
        "        if leaf",
        "test_weights.py::test_persistent_floating_buffers_come_from_the_snapshot_and_no_others",
    ),
    (
        "tied weights are counted twice",
        "weights.py",
        "    named = ((clean_name(name), parameter) for name, parameter in module.named_parameters())\n",
        "    named = ((clean_name(n), p) for n, p in module.named_parameters(remove_duplicate=False))\n",
        "test_weights.py::test_trainable_floating_parameters_are_merged_once_each",
    ),
    (
        "frozen parameters are averaged",
        "weights.py",
        "        if parameter.requires_grad and parameter.is_floating_point()",
        "        if parameter.is_floating_point()",
        "test_weights.py::test_trainable_floating_parameters_are_merged_once_each",
    ),
    (
        "the callback goes on watching after fit",
        "evaluate.py",
        "        loop.run.observers.remove(observer)\n",
        "",
        "test_observer.py::test_the_callback_leaves_nothing_on_trainer_and_module",
    ),
    (
        "the merge is summed in bfloat16",
        "combine.py",
        "        self.dtype = torch.promote_types(out.dtype, torch.float32)\n",
        "        self.dtype = torch.bfloat16\n",
        "test_snapshots.py::test_bfloat16_storage_keeps_what_a_bfloat16_sum_would_lose",
    ),
    (
        "snapshots are taken per batch and not per optimizer step",
        "callback.py",
        "        step = optimizer_step(trainer)\n        if step == self._step:\n            return\n",
        "        step = self._step + 1\n",
        "test_callback.py::test_accumulated_batches_are_one_step",
    ),
    (
        "batches without an optimizer step count as a constant learning rate",
        "callback.py",
        "        if step == self._step:\n            return\n",
        "",
        "test_callback.py::test_a_warmup_is_seen_through_accumulation",
    ),
    (
        "resume loses the window",
        "callback.py",
        '            if changes := self._capture.load_state_dict(self._loaded_state["capture"], pl_module, reader):',
        "            if changes := []:",
        "test_resume.py::test_a_run_resumed_from_any_of_its_checkpoints_equals_the_one_that_went_on",
    ),
    (
        "resume loses the schedule",
        "capture.py",
        '            self.schedule = CaptureSchedule(**state["schedule"])',
        "            pass",
        "test_capture.py::test_an_interrupted_capture_goes_on_as_if_it_had_not_stopped",
    ),
    (
        "resume loses the phase",
        "capture.py",
        '        self.phase = StablePhase(**state["phase"])\n',
        "",
        "test_capture.py::test_an_interrupted_capture_goes_on_as_if_it_had_not_stopped",
    ),
    (
        "resume loses the count of validations",
        "validation.py",
        '        self.num_validations = state["num_validations"]\n',
        "",
        "test_resume.py::test_a_run_resumed_from_any_of_its_checkpoints_equals_the_one_that_went_on",
    ),
    (
        "names of compiled modules are matched as they are",
        "weights.py",
        '    return _WRAPPERS.sub("", name)',
        "    return name",
        "test_weights.py::test_wrappers_leave_no_trace_in_names",
    ),
    (
        "a snapshot with NaN is taken",
        "capture.py",
        "        if bad := nonfinite_names(parameters):",
        "        if bad := nonfinite_names({k: v.nan_to_num() for k, v in parameters.items()}):",
        "test_capture.py::test_a_snapshot_with_nan_is_refused_by_name_and_the_window_stays",
    ),
    (
        "the budget of the merged validation is ignored",
        "evaluate.py",
        "    if limit_batches is None or num_batches == 0:",
        "    if True:",
        "test_callback.py::test_with_a_limit_both_sides_of_the_gain_are_taken_on_the_same_batches",
    ),
    (
        "the gain compares some batches with all batches",
        "validation.py",
        "            live = evaluation.live or live\n",
        "",
        "test_callback.py::test_with_a_limit_both_sides_of_the_gain_are_taken_on_the_same_batches",
    ),
    (
        "merged values take the live names",
        "logged.py",
        'logged[names("merged", metric, merge)] = replace(',
        "logged[metric] = replace(",
        "test_observer.py::test_training_is_bit_identical_with_and_without_the_callback",
    ),
    (
        "the gain has the wrong sign where more is better",
        "prediction.py",
        "return other - live if higher_is_better else live - other",
        "return live - other",
        "test_callback.py::test_the_gain_is_positive_where_the_merge_is_better",
    ),
    (
        "random states go on in the merged validation",
        "evaluate.py",
        "        stack.enter_context(preserved_rng())\n",
        "",
        "test_observer.py::test_training_is_bit_identical_with_and_without_the_callback",
    ),
    (
        "metric objects are not emptied before the merged validation",
        "preserve.py",
        "            metric.reset()\n",
        "            pass\n",
        "test_preserve.py::test_whatever_a_module_keeps_is_as_before_and_in_the_same_objects",
    ),
    (
        "what modules keep is not put back",
        "evaluate.py",
        "        stack.enter_context(preserved_attributes(module))\n",
        "",
        "test_observer.py::test_training_is_bit_identical_with_and_without_the_callback",
    ),
    (
        "generators of loaders go on in the merged validation",
        "evaluate.py",
        "        stack.enter_context(preserved_loaders(loaders.flattened))\n",
        "",
        "test_observer.py::test_a_loader_with_a_generator_of_its_own_gives_the_live_validation_the_same_order",
    ),
    (
        "merged values are written into the loggers under live names",
        "evaluate.py",
        "                loggers=[_SilentLogger(logger) for logger in trainer.loggers],\n",
        "",
        "test_observer.py::test_training_is_bit_identical_with_and_without_the_callback",
    ),
    (
        "other callbacks' hooks run twice",
        "evaluate.py",
        '        return _do_nothing if name.startswith("on_") else getattr(self._callback, name)',
        "        return getattr(self._callback, name)",
        "test_observer.py::test_other_callbacks_are_there_in_the_merged_validation_but_their_hooks_are_not_called",
    ),
    (
        "live values are overwritten in callback_metrics",
        "evaluate.py",
        "                _logger_connector=connector,\n",
        "",
        "test_observer.py::test_training_is_bit_identical_with_and_without_the_callback",
    ),
    (
        "merged values come too late for monitors",
        "evaluate.py",
        "        with _called_after_epoch_end(self.trainer.lightning_module, self._publish):\n            return run()",
        "        outputs = run()\n        self._publish()\n        return outputs",
        "test_callback.py::test_early_stopping_and_checkpoints_monitor_merged_values_of_the_same_validation",
    ),
    (
        "a signal handler that saves during the merged validation saves the merge",
        "evaluate.py",
        "                save_checkpoint=save_live_checkpoint,\n",
        "",
        "test_observer.py::test_a_checkpoint_that_a_signal_handler_saves_in_the_merged_validation_is_the_live_one",
    ),
    (
        "buffers that are replaced by others keep what the merged validation made of them",
        "preserve.py",
        "        self._undo.callback(_refill, module._buffers, dict(module._buffers))\n",
        "",
        "test_observer.py::test_what_a_validation_changes_in_objects_and_buffers_is_the_live_validation_s_alone",
    ),
    (
        "the hook that publishes is still on the module when others copy it",
        "evaluate.py",
        "            replaced.close()\n",
        "",
        "test_observer.py::test_the_module_can_be_pickled_and_copied_at_the_end_of_a_validation",
    ),
    (
        "the top of a long cosine counts as a constant rate",
        "phase.py",
        "SAME_TOLERANCE = 1e-15",
        "SAME_TOLERANCE = 1e-9",
        "test_phase.py::test_a_cosine_never_settles_however_long_it_is",
    ),
    (
        "the last checkpoint of a run may be a merge",
        "checkpoint.py",
        '    CHECKPOINT_NAME_LAST = "merged-last"\n',
        "",
        "test_exports.py::test_the_last_checkpoint_of_a_run_is_never_a_merge",
    ),
    (
        "thinning loses the start of the window",
        "snapshots.py",
        "        self._keep(range(0, len(self.steps), 2))",
        "        self._keep(range(1, len(self.steps), 2))",
        "test_capture.py::test_without_arguments_the_ring_always_covers_the_last_tenth_of_training",
    ),
    (
        "the window goes on in the decay",
        "capture.py",
        "                self._drop_spurious_window()\n            return False\n",
        "                self._drop_spurious_window()\n",
        "test_capture.py::test_nothing_is_captured_in_warmup_or_decay_and_the_window_is_frozen_and_kept",
    ),
    (
        "1-sqrt is applied to the snapshots and not to the learning rate",
        "rules.py",
        "        return coefficients_from_decay(multipliers)",
        "        return [m / sum(multipliers) for m in multipliers]",
        "test_rules.py::test_ten_even_snapshots_get_the_published_weights",
    ),
    (
        "the EMA over snapshots does not sum to one",
        "rules.py",
        "        return [(1 - alpha) ** (len(steps) - 1), *newer]",
        "        return [alpha * (1 - alpha) ** (len(steps) - 1), *newer]",
        "test_rules.py::test_the_ema_of_equal_values_is_that_value",
    ),
    (
        "a half-written file takes the place of the old one",
        "files.py",
        '    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")',
        "    unfinished = path",
        "test_exports.py::test_a_full_disk_leaves_no_half_file_and_the_older_one_stays",
    ),
    (
        "a branch leaves its rate to the scheduler, which goes on from it",
        "rates.py",
        '            group["lr"] = group["lr"].copy_(rate) if isinstance(rate, Tensor) else rate\n',
        "            pass\n",
        "test_anneal.py::test_the_multiplier_goes_on_top_of_what_the_scheduler_sets",
    ),
    (
        "snapshots are taken while a branch decays",
        "rates.py",
        '        math.nan if "train_mode" in group else float(group["lr"]) * _multiplier(optimizer)\n',
        '        math.nan if "train_mode" in group else float(group["lr"])\n',
        "test_anneal.py::test_the_merge_of_a_branch_stays_that_of_its_trunk_wherever_it_is_listed",
    ),
    (
        "a branch begins anew when it is resumed",
        "anneal.py",
        "        start = optimizer_step(trainer) if self._loaded_start is None else self._loaded_start\n",
        "        start = optimizer_step(trainer)\n",
        "test_anneal.py::test_an_interrupted_branch_ends_as_the_one_that_was_not",
    ),
    (
        "merged values are recorded as annealed ones",
        "evaluate.py",
        "for name, value in logged.items() if name not in self.published",
        "for name, value in logged.items()",
        "test_anneal.py::test_an_interrupted_branch_ends_as_the_one_that_was_not",
    ),
    (
        "concurrent writers of records overwrite each other",
        "records.py",
        "os.O_APPEND | os.O_CREAT | os.O_WRONLY",
        "os.O_CREAT | os.O_WRONLY",
        "test_records.py::test_concurrent_writers_lose_nothing",
    ),
    (
        "branches that end later than now teach",
        "calibration.py",
        "if record.run != run or record.step <= now.step]",
        "]",
        "test_calibration.py::test_other_runs_teach_alone_and_beside_two_branches_of_the_run_itself",
    ),
    (
        "the prediction moves on while the run decays",
        "validation.py",
        "if self.is_evaluated and capture.is_comparable:",
        "if self.is_evaluated:",
        "test_calibration.py::test_a_prediction_is_checked_by_the_decay_of_the_run_itself",
    ),
    (
        "the half-life forgets the gap between updates",
        "shadow.py",
        "        return 0.5 ** (gap / in_steps(self.half_life_steps, self.half_life, step))\n",
        "        return 0.5 ** (1 / in_steps(self.half_life_steps, self.half_life, step))\n",
        "test_shadow.py::test_the_mean_age_of_a_half_life_average_is_that_of_theory",
    ),
    (
        "the power-function average forgets the gap between updates",
        "shadow.py",
        "        return (1 - gap / step) ** (self.gamma + 1)\n",
        "        return (1 - 1 / step) ** (self.gamma + 1)\n",
        "test_shadow.py::test_the_mean_age_of_a_power_function_average_is_that_of_theory",
    ),
    (
        "an average of bfloat16 weights is kept in bfloat16",
        "shadow.py",
        "    return torch.promote_types(dtype, torch.float32)\n",
        "    return dtype\n",
        "test_shadow.py::test_small_steps_of_narrow_weights_are_not_lost",
    ),
    (
        "one NaN step poisons an average over every step for good",
        "capture.py",
        "            self.shadows[name].clear()\n        return dropped\n",
        "            pass\n        return dropped\n",
        "test_shadow.py::test_an_average_that_met_nan_is_named_and_begins_anew_once_the_weights_are_sound",
    ),
    (
        "resume loses an average over every step",
        "shadow.py",
        '        saved: Mapping[str, Tensor] = state["tensors"]\n',
        "        return True\n",
        "test_resume.py::test_a_run_resumed_from_any_of_its_checkpoints_equals_the_one_that_went_on",
    ),
    (
        "what is trained is looked up once and for all",
        "weights.py",
        "        if self._is_changed():\n",
        "        if False:\n",
        "test_weights.py::test_live_tensors_are_found_again_after_any_change_of_the_module",
    ),
    (
        "weights are copied for an average while it still moves towards those of the step before",
        "shadow.py",
        "        self.wait()\n        self._copy.write(0, step, live)\n",
        "        self._copy.write(0, step, live)\n        self.wait()\n",
        "test_shadow.py::test_averages_in_host_memory_are_made_of_the_weights_as_they_were_at_each_step",
    ),
    (
        "a merge to keep lies where the next one is made",
        "snapshots.py",
        "[out or self.storage.new_row()]",
        "[out or self._kept(1)[0]]",
        "test_snapshots.py::test_a_merge_to_keep_is_not_overwritten_by_the_next_one",
    ),
    (
        "each of several merges reads the snapshots for itself",
        "combine.py",
        "        by_order[tuple(value < 0 for value in values)].append((out, values))\n",
        "        by_order[len(by_order), *(value < 0 for value in values)].append((out, values))\n",
        "test_combine.py::test_every_row_is_read_once_for_several_sums_and_never_without_a_coefficient",
    ),
    (
        "a signal while contents are exchanged loses live weights",
        "swap.py",
        "        for contents in reversed(self._contents):\n",
        "        for contents in self._contents:\n",
        "test_swap.py::test_a_signal_handler_has_the_live_contents_and_the_others_are_there_afterwards",
    ),
    (
        "a second interrupt leaves some of the merge in the model",
        "swap.py",
        "            exchange.put_back(for_good=True)\n            raise\n",
        "            raise\n",
        "test_swap.py::test_an_interrupt_while_contents_are_exchanged_leaves_the_live_ones",
    ),
    (
        "a corrupt snapshot is merged",
        "storage.py",
        '        if sums != told["checksums"]:\n',
        "        if False:\n",
        "test_storage.py::test_a_spoilt_file_is_named_and_left_out",
    ),
    (
        "what hooks of the merged validation set in trainer and optimizers stays",
        "evaluate.py",
        "        stack.enter_context(preserved_trainer(trainer))\n",
        "",
        "test_observer.py::test_what_hooks_of_the_validation_do_to_the_training_is_done_once",
    ),
    (
        "what a signal handler sets during a merged validation is lost",
        "preserve.py",
        "        undo.enter_context(_noted_by_signals(trainer, numbers))\n",
        "",
        "test_preserve.py::test_what_a_signal_handler_sets_in_the_trainer_stays",
    ),
    (
        "gradients that a hook of the validation makes stay",
        "preserve.py",
        "        parameter.grad = grad\n",
        "        pass\n",
        "test_preserve.py::test_what_hooks_set_in_trainer_optimizers_and_schedulers_is_put_back",
    ),
    (
        "hooks of the merged validation do not find what was logged before",
        "evaluate.py",
        "        getattr(connector, kind).update(getattr(trainer._logger_connector, kind))\n",
        "        pass\n",
        "test_observer.py::test_what_hooks_of_the_validation_do_to_the_training_is_done_once",
    ),
    (
        "objects of classes from the user's other files are not put back",
        "preserve.py",
        'if package in (own_package, "__main__"):\n        return True\n',
        "if True:\n        return package == own_package\n",
        "test_observer.py::test_what_hooks_of_the_validation_do_to_the_training_is_done_once",
    ),
    (
        "files of another run pass for this one's",
        "storage.py",
        'if told["owner"] != self._owner or',
        "if",
        "test_storage.py::test_snapshots_of_another_run_in_the_same_directory_are_told_from_those_of_this_one",
    ),
    (
        "a pickled ring goes on with views of other memory",
        "snapshots.py",
        "        self.__dict__.update(state)\n        self._views = slot_views(self.layout, self._slots)\n",
        "        self.__dict__.update(state)\n        self._views = slot_views(self.layout, self._slots)\n"
        "        self._slots = [[part.clone() for part in row] for row in self._slots]\n",
        "test_storage.py::test_a_copy_of_a_ring_goes_on_as_the_ring_itself",
    ),
    (
        "the merge of a finished run is not found in its checkpoint",
        "callback.py",
        "        if self._loaded_state is not None:\n            # The checkpoint was that of a finished run",
        "        if False:\n            # The checkpoint was that of a finished run",
        "test_resume.py::test_the_merge_of_a_finished_run_is_got_from_its_checkpoint",
    ),
    (
        "a merge on disk replaces what it is made of",
        "merge.py",
        "    if output.resolve() in resolved:\n",
        "    if False:\n",
        "test_merge.py::test_an_output_that_is_one_of_the_checkpoints_is_refused",
    ),
    (
        "a checkpoint holds room for snapshots that are not there",
        "snapshots.py",
        "    slots = [layout.new_row(device, dtype, pin_memory=pin_memory) for _ in range(capacity)]\n",
        "    rows = [torch.empty(capacity, part.numel(), dtype=part.dtype) for part in layout.new_row(device, dtype)]\n"
        "    slots = [[row[slot] for row in rows] for slot in range(capacity)]\n",
        "test_resume.py::test_a_checkpoint_grows_by_the_snapshots_that_there_are_and_little_more",
    ),
    (
        "the time of an earlier fit is forgotten",
        "validation.py",
        "        self.budget.elapsed, self._began = self._elapsed(), None\n",
        "        self._began = None\n",
        "test_budget.py::test_the_time_of_a_fit_counts_where_another_goes_on_from_it_and_that_between_them_does_not",
    ),
    (
        "a module that clips its weights does so while they are still copied",
        "callback.py",
        "        is_own_hook = pl_module.on_train_batch_end.__module__ not in _EMPTY_HOOKS",
        "        is_own_hook = False",
        "test_storage.py::test_whatever_writes_to_the_weights_waits_for_copies_under_way",
    ),
    (
        "shards are written over a mesh that passes for the model's",
        "shards.py",
        "mesh_dim_names=names, _init_backend=False)",
        "mesh_dim_names=spec.mesh.mesh_dim_names, _init_backend=False)",
        "test_sharded.py::test_shards_are_written_from_the_memory_where_they_are",
    ),
    (
        "what an average holds beside the shards is saved by the ring's names",
        "capture.py",
        'yield f"shadow.{average}.{name}", name, tensor',
        'yield f"ring.{average}.{name}", name, tensor',
        "test_sharded.py::test_a_sharded_run_that_was_interrupted_equals_the_one_that_was_not",
    ),
    (
        "the share of the wall time is ignored",
        "budget.py",
        "        return self.spent + self.latest <= ",
        "        return True or self.spent + self.latest <= ",
        "test_budget.py",
    ),
    (
        "gathered parameters are captured instead of shards",
        "shards.py",
        "            submodule.reshard()\n",
        "            pass\n",
        "test_sharded.py::test_training_on_two_ranks_is_bit_identical_with_and_without_the_callback",
    ),
    (
        "a snapshot with NaN on one rank is taken on the others",
        "capture.py",
        "            self.ring.leave_open(step, problem)\n",
        "            pass\n",
        "test_sharded.py::test_a_nan_on_one_rank_refuses_the_snapshot_on_all",
    ),
    (
        "an average with NaN on one rank is dropped there alone",
        "capture.py",
        "list(united(bad) if self.sharding.is_sharded else bad)",
        "list(bad)",
        "test_sharded.py::test_an_average_with_nan_on_one_rank_begins_anew_on_all",
    ),
    (
        "a layer under another name is captured under the old one",
        "weights.py",
        "        return [*parameters, *buffers, *names, *map(len, self._not_persistent)]\n",
        "        return [*parameters, *buffers]\n",
        "test_weights.py::test_live_tensors_are_found_again_after_any_change_of_the_module",
    ),
    (
        "the live validation under DDP keeps the buffers of each rank",
        "evaluate.py",
        "            stack.enter_context(_replaced(wrapper, require_forward_param_sync=is_due))\n",
        "",
        "test_sharded.py::test_batch_norm_statistics_that_differ_by_rank_are_those_of_rank_0_as_in_a_live_validation",
    ),
    (
        "every rank records the branch",
        "anneal.py",
        "        if not trainer.is_global_zero:\n            return\n",
        "",
        "test_sharded.py::test_a_branch_of_a_sharded_run_is_recorded_once_as_that_of_one_process",
    ),
    (
        "rank 0's shards are resumed everywhere",
        "shards.py",
        "                dcp.load({found: tensors}, checkpoint_id=path)\n",
        "                dcp.load({found: {n: local(t) for n, t in tensors.items()}}, checkpoint_id=path)\n",
        "test_sharded.py::test_a_sharded_run_that_was_interrupted_equals_the_one_that_was_not",
    ),
    (
        "what TensorBoard is shown once more is a step off",
        "evaluate.py",
        "else trainer.fit_loop.epoch_loop._batches_that_stepped",
        "else trainer.global_step",
        "test_dashboards.py::test_merged_and_annealed_values_are_runs_of_their_own_under_the_live_metric_s_name",
    ),
    (
        "the callback's layout of charts stands where the user's own does",
        "dashboards.py",
        "                run.add_custom_scalars(",
        "                logger.experiment.add_custom_scalars(",
        "test_dashboards.py::test_the_layout_is_written_once_and_predictions_bring_their_own_part",
    ),
    (
        "charts with an interval are given patterns, and stay empty",
        "dashboards.py",
        'str(LoggedName("annealed", label, metric, end)) for end',
        '"^" + str(LoggedName("annealed", label, metric, end)) + "$" for end',
        "test_dashboards.py::test_the_layout_is_written_once_and_predictions_bring_their_own_part",
    ),
    (
        "a figure of the merge is drawn at every validation",
        "dashboards.py",
        "        is_drawn = self._num_shown & (self._num_shown - 1) == 0\n",
        "        is_drawn = True\n",
        "test_dashboards.py::test_figures_of_the_merge_become_rarer_as_the_run_goes_on",
    ),
    (
        "Weights & Biases takes the smallest value for the best of every metric",
        "dashboards.py",
        'best = "max" if name.kind == "merge_gain" or value.higher_is_better else "min"',
        'best = "min"',
        "test_loggers.py::test_weights_and_biases_has_them_and_knows_their_best",
    ),
    (
        "names that some loggers refuse are logged as they are",
        "arguments.py",
        '    return re.sub(r"[^A-Za-z0-9_.-]", "_", name)\n',
        "    return name\n",
        "test_dashboards.py::test_merged_and_annealed_values_are_runs_of_their_own_under_the_live_metric_s_name",
    ),
    (
        "the progress bar shows the merge under its whole name",
        "evaluate.py",
        'shown = {name.partition("/")[0]: ',
        "shown = {name: ",
        "test_callback.py::test_the_progress_bar_shows_the_primary_merge_of_what_it_shows_live_under_one_short_name",
    ),
    (
        "a config says another default than the constructor",
        "conf/merge_callback/defaults.yaml",
        "num_snapshots: 10\n",
        "num_snapshots: 12\n",
        "test_conf.py::test_every_argument_stands_in_the_config_with_its_default",
    ),
    (
        "the best job of a sweep has the smallest value also where more is better",
        "comparison.py",
        "    sign = 1 if sum(",
        "    sign = 1 if True or sum(",
        "test_comparison.py::test_the_best_merge_is_found_whether_less_or_more_is_better",
    ),
    (
        "one job that diverged makes the worst merge the best",
        "comparison.py",
        "all(map(math.isfinite, (live, merged, better)))",
        "True",
        "test_comparison.py::test_a_job_that_diverged_is_not_the_best_and_makes_no_other_so",
    ),
    (
        "every Hydra app imports torch",
        "../hydra_plugins/merge_callback/__init__.py",
        "path=f\"file://{Path(spec.origin).parent / 'conf'}\"",
        'path="pkg://merge_callback.conf"',
        "test_conf.py::test_an_app_that_uses_none_of_it_does_not_import_torch",
    ),
    (
        "checkpoints are put together in the order given",
        "merge.py",
        "    order = sorted(range(len(opened)), key=known.__getitem__)\n",
        "    order = list(range(len(opened)))\n",
        "test_merge.py::test_the_merge_is_that_of_the_live_callback_to_the_bit",
    ),
    (
        "a file that was packed again is read where torch would have written it",
        "stored.py",
        "contents.get(position) != storage.nbytes():",
        "False:",
        "test_merge.py::test_files_that_are_cut_short_packed_again_old_or_hostile_are_refused",
    ),
    (
        "a pattern given alone is taken letter by letter, so that a star is everything",
        "weights.py",
        "((patterns,) if isinstance(patterns, str) else patterns)",
        "patterns",
        "test_sweep.py::test_tensors_that_differ_and_cannot_be_averaged_are_taken_from_the_newest_where_asked",
    ),
    (
        "values that torch negates when they are asked for are read as they lie in the file",
        "stored.py",
        "    if tensor.is_conj() or tensor.is_neg():\n",
        "    if False:\n",
        "test_merge.py::test_tensors_that_cannot_be_merged_are_refused_by_name",
    ),
    (
        "a recovery that came later than the callback does not know the buffers",
        "recovery.py",
        "        if kept and kept[-1] not in self._buffers:\n",
        "        if False:\n",
        "test_recovery.py::test_a_recovery_that_is_added_on_resume_knows_the_buffers_of_the_newest_snapshot",
    ),
    (
        "inputs that are not finite make the statistics NaN",
        "recalibrate.py",
        "                is_bad = not _is_finite(own)\n",
        "                is_bad = False\n",
        "test_recalibrate.py::test_inputs_that_are_not_finite_are_left_out",
    ),
    (
        "NaN in a checkpoint is merged",
        "merge.py",
        "        if not content.isfinite().all():",
        "        if False:",
        "test_merge.py::test_checkpoints_that_do_not_fit_are_refused_by_name_and_nothing_is_written",
    ),
    (
        "snapshots of the spike stay in the window",
        "recovery.py",
        "        self.merge_callback.forget_since(began, self._buffers_near(steps[-1]) if steps else None)\n",
        "",
        "test_recovery.py::test_snapshots_that_were_taken_since_the_spike_began_are_dropped",
    ),
    (
        "lowered rates are forgotten on resume",
        "recovery.py",
        '            self._rates_until = state["rates_until"]\n',
        "",
        "test_recovery.py::test_a_run_that_is_interrupted_after_a_recovery_ends_as_the_one_that_was_not",
    ),
    (
        "rates stay lowered",
        "recovery.py",
        "        if step >= self._rates_until:\n            self._restore_rates()\n",
        "",
        "test_recovery.py::test_rates_are_lowered_for_some_steps_and_the_schedulers_own_again",
    ),
    (
        "a rise is compared with losses from before the loss fell",
        "spikes.py",
        "min(median(before), median(recent))",
        "median(before)",
        "test_spikes.py::test_a_rise_is_found_in_time_while_the_loss_falls_fast",
    ),
    (
        "an accident of one rank alone is not seen by the others",
        "recovery.py",
        "trainer.strategy.reduce_boolean_decision(bool(own and nonfinite_names(own)), all=False)",
        "bool(own and nonfinite_names(own))",
        "test_sharded.py::test_all_ranks_recover_alike_from_an_accident_even_of_one_of_them",
    ),
    (
        "a decay is applied twice where a step calls its base's",
        "rates.py",
        "        if self._depth[optimizer] > 1:\n            return\n",
        "",
        "test_anneal.py::test_an_optimizer_whose_step_calls_its_bases_step_decays_once",
    ),
    (
        "what is excluded is merged all the same",
        "weights.py",
        "        return fits(name, self.include) and not fits(name, self.exclude)\n",
        "        return fits(name, self.include)\n",
        "test_selection.py::test_what_is_excluded_is_live_and_the_rest_is_the_float64_twins_merge",
    ),
    (
        "a mistyped pattern is taken in silence",
        "callback.py",
        "            check_patterns(pl_module, self.selection)\n",
        "",
        "test_selection.py::test_patterns_that_fit_nothing_or_leave_nothing_are_refused",
    ),
    (
        "recalibration writes to the live buffers",
        "recalibrate.py",
        "swapped_weights(buffers, copies(buffers)):",
        "swapped_weights({}, {}):",
        "test_recalibrate.py::test_training_is_bit_identical_whatever_the_forward_pass_does",
    ),
    (
        "recalibration changes layers that are frozen",
        "recalibrate.py",
        "if name in inputs.in_training and _keeps_statistics(each)]",
        "if _keeps_statistics(each)]",
        "test_recalibrate.py::test_frozen_layers_and_those_that_no_input_reaches_keep_their_statistics",
    ),
    (
        "whoever saves during recalibration saves the merge",
        "evaluate.py",
        "        with _saving_live_weights(self.trainer):\n",
        "        if True:\n",
        "test_recalibrate.py::test_a_checkpoint_that_a_signal_handler_saves_meanwhile_is_the_live_one",
    ),
    (
        "lowered rates end the window",
        "recovery.py",
        "lambda: factor, is_decay=False)",
        "lambda: factor)",
        "test_recovery.py::test_lowered_rates_do_not_end_the_window",
    ),
    (
        "the merge keeps the buffers of a spike",
        "callback.py",
        "            self._capture.buffers = copies(buffers)\n",
        "            pass\n",
        "test_recovery.py::test_the_merge_has_no_buffers_of_the_spike",
    ),
    (
        "recalibrated statistics forget the first batches",
        "recalibrate.py",
        "                norm.momentum = None\n",
        "                pass\n",
        "test_recalibrate.py::test_statistics_are_those_that_torch_calculates_from_the_same_batches",
    ),
    (
        "inputs for recalibration are lost on resume",
        "callback.py",
        '                self._recalibration.inputs.load_state_dict(self._loaded_state["inputs"], pl_module.device)\n',
        "                pass\n",
        "test_recalibrate.py::test_a_resumed_run_recalibrates_from_the_batches_of_the_one_that_was_interrupted",
    ),
    (
        "routers of the merge are compared with themselves",
        "validation.py",
        "self._routers.compare(choices, self._choices(trainer))",
        "self._routers.compare(choices, choices)",
        "test_routers.py::test_what_is_logged_is_what_plain_counting_finds",
    ),
    (
        "a sweep takes the values of changed checkpoints for its own",
        "sweep.py",
        "stats[s].st_size, stats[s].st_mtime_ns",
        "0, 0",
        "test_sweep.py::test_a_changed_checkpoint_or_config_is_validated_again",
    ),
    (
        "points of a plane lie beside their checkpoints",
        "landscape.py",
        "    second = (x - third * points[2][0]) / points[1][0]\n",
        "    second = x / points[1][0]\n",
        "test_landscape.py::test_a_place_on_the_plane_is_as_far_from_the_corners_as_its_weights_are",
    ),
    (
        "one bad batch is a spike",
        "spikes.py",
        "        if sum(latest) / self.patience - level <=",
        "        if max(latest) - level <=",
        "test_spikes.py::test_one_bad_batch_is_no_spike",
    ),
]


def passes(folder: Path, tests: list[str]) -> bool:
    """Whether these tests pass in a copy of the repository."""
    # Of files that are slow as a whole all cases are run, of others those that are not.
    slow = [test for test in tests if "test_sharded.py" in test]
    if slow and len(slow) < len(tests):
        return passes(folder, slow) and passes(folder, [test for test in tests if test not in slow])
    which = [] if slow else ["-m", "not slow"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", *which, "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"the tests did not run: {done.stdout}{done.stderr}")
    return done.returncode == 0


def main(words: list[str]) -> None:
    """Puts faults in, one at a time, and records which were noticed.

    Args:
        words: Only faults that one of these occurs in; the others keep what was recorded. None at all: every fault.
    """
    chosen = [fault for fault in FAULTS if not words or any(word in fault[0] for word in words)]
    known = {result["fault"]: result for result in json.loads(RECORD.read_text())["faults"]} if words else {}
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "copy"
        shutil.copytree(
            ROOT, folder, symlinks=True, ignore=shutil.ignore_patterns(".git", ".venv*", "outputs", ".*cache")
        )
        if not passes(folder, sorted({f"tests/{test}" for *_, test in chosen})):
            sys.exit("the tests fail without any fault")
        for what, file, code, fault, test in chosen:
            path = folder / "src" / "merge_callback" / file
            original = path.read_text()
            if original.count(code) != 1:
                sys.exit(f"{file} does not hold the code of the fault {what!r} once: {code!r}")
            path.write_text(original.replace(code, fault))
            caught = not passes(folder, [f"tests/{test}"])
            path.write_text(original)
            known[what] = {"fault": what, "file": file, "test": test, "caught": caught, "commit": commit}
            sys.stdout.write(f"{'caught' if caught else 'NOT CAUGHT'}: {what}\n")
            sys.stdout.flush()
    results = [known[fault[0]] for fault in FAULTS if fault[0] in known]
    versions = {name: version(name) for name in ("torch", "lightning")}
    RECORD.write_text(json.dumps({"versions": versions, "faults": results}, indent=1) + "\n")
    if not all(result["caught"] for result in results):
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
