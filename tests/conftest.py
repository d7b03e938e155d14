"""Strict settings for every test: set before jax starts, no exceptions hidden."""

import os
import re

from tests import flags

# Read when the libraries are first imported, so they come before any other import.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
ON_CPU = os.environ["JAX_PLATFORMS"] == "cpu"  # `tests/device/conftest.py` says how not
# Workers inherit what is left at the end of this.
CHOOSES_FLAGS = ON_CPU and os.environ.get("XLA_FLAGS", flags.COMMON) == flags.COMMON
if CHOOSES_FLAGS:
    os.environ["XLA_FLAGS"] = flags.quick()
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import socket

import jax
import pytest

VIRTUAL_DEVICES = 8
SLOW_CASES = [
    r"test_cache.py::test_rewinding.*bfloat16-(min_gru|recurrent\]|local|global|gemma)",
    r"test_cache.py::test_rewinding.*float32-(local_attention|recurrent)\]",
    r"test_cache.py::test_rewinding.*float32-gemma2-wide",
    r"test_cache.py::test_local_rings_grow.*\[0\]",
    r"test_cache.py::test_an_overflow_shows.*\[global",
    r"test_speculation.py::test_gemma_2_with_a_draft.*\[300",
    r"test_griffin.py::test_packed_document.*\[gemma2-wide",
    r"test_cli.py::test_compiled_programs_are_kept_for_the_next_command",
    r"test_griffin_golden.py::test_bfloat16\[(?!griffin_mixed)",
    r"test_griffin_golden.py::test_loss_and_every_gradient\[(?!griffin_mixed)",
    r"test_griffin.py::test_gradients_flow_through_the_cache\[(?!nano\])",
    r"test_speculation.py::test_the_text_is_that_of_plain_decoding.*-all\]",
    r"test_speculation.py::.*plain_decoding\[global_attention-recurrent-greedy",
    r"test_prefix.py::test_scores_are_the_plain_forwards\[gemma",
    r"test_sampler.py::test_decoding_equals_the_plain_forward\[hawk",
    r"test_sampler.py::test_golden_case\[(alone|batch\])",
    r"test_transformers.py::test_greedy_generation\[generate_1",
    r"test_versus.py::test_a_failing_command_and_a_dead_worker_say_why",
    r"test_versus.py::test_everything_runs_with_our_worker_alone",
    r"test_scan_estimates.py::test_table_from_what_the_compiler_writes",
    r"test_pallas_gpu.py::test_it_lowers_for_a_gpu\[(float16|float32-rg)",
    r"test_pallas_tpu.py::test_scan_over_many_blocks\[(bfloat16-16|float32-8)",
    r"test_recurrent_step.py::test_the_kernel_over_many_blocks\[32",
    r"test_recurrent_step.py::test_the_kernel_under_a_mesh\[4",
    r"test_recurrent_step.py::test_steps_are_a_chunk.*bfloat16",
    r"test_rg_lru.*::test_bfloat16\[pallas_tpu_from_logits",
    r"test_rg_lru.*::test_split_invariance.*\[(pallas_tpu_from_logits|pallas_gpu)",
    r"test_rg_lru.*::test_values_and_gradients\[(pallas\w+-[17]\b|pallas_tpu_from_l)",
    r"test_local_attention.py::test_split_invariance\[(splash-24|reference)",
    r"test_local_attention.py::test_(decode|dtypes|transformations.*)\[splash",
    r"test_linear_scan.py::(?!test_values_and_gradients\[mosaic_gpu-128).*mosaic_gpu",
    r"test_linear_scan.py::test_golden\[linear_scan_real_long-pallas",
    r"test_linear_scan.py::test_split_invariance\[pallas\w+-False",
    r"test_rg_lru.py::test_(golden|dtypes).*pallas_tpu_from_logits",
    r"test_linear_scan.py::test_slow_decay_over_100000_steps\[(?!chunked)",
    r"training/test_sharding.py::test_a_step_is.*\[(?!fsdp=2,tensor)",
    r"training/test_sharding.py::test_an_evaluation.*explicit",
    r"test_sharding.py::test_what_is_accepted_runs_like_one_device\[(?!foreign)",
    r"test_layers.py::test_complex_rg_lru\[(documents-no_h0|continuing-with)",
    r"test_long_gradients.py::test_chunks_change_no_gradient\[(?!griffin)",
    r"test_cache.py::test_a_gradient_of_the_cache.*\[(global|min_gru)",
    r"test_learned_prefix.py::test_the_loss_after_a_prefix",
    r"test_losses.py::test_loss_and_gradients_are_those_of.*\[packed",
    r"test_verify.py::test_the_layers_lead_to_the_model_s_own_logits\[(?!griffin)",
    r"test_sampler.py::test_a_row_in_a_batch_is_what_it_is_alone.*penalty=None",
    r"test_transformers.py::test_loss_and_gradients\[(?!recurrent_gemma)",
    r"test_adapters.py::test_gradients_of_the_adapters_alone",
    r"test_adapters.py::test_(sampling_and_scoring|inspection|rows_of_both_ways)",
    r"test_step.py::test_parts_of_a_batch_add_up_to_the_whole",
    r"test_notebooks.py::test_short_form",
    r"test_adapters.py::test_the_merged_model_is_saved.*\[official",
    r"test_scorer.py::.*\[global",
    r"test_evaluation_benchmarks.py::test_needle_rows_are_kept",
    r"test_device_suite.py::test_the_whole_suite",
    r"test_gpu_blocks.py::test_the_fastest.*\[(?!linear_scan\])",
    r"benchmarks/test_adapters.py::test_every_way_is_a_row",
    r"test_memory.py::test_a_checkpoint_of.*\[\w+-(float32-columns|bfloat16-replicated)",
    r"test_memory.py::test_a_checkpoint_of.*\[official_\w+-bfloat16",
    r"test_memory.py::test_saving.*\[(hugging_face|official_pytorch)",
    r"test_verify.py::test_bfloat16_and_again",
    r"test_meshes.py::test_sampler\[(auto|sequence)",
    r"test_meshes.py::test_model_and_gradient\[(auto|explicit |sequence)",
]
"""Heavy cases that the default run leaves out, as patterns of their names: other cases
of the same tests, of the same code, stay (of the notebooks, `.ci/run` executes the short
forms). `-m slow` runs them; `-m repeated` them alone."""

jax.config.update("jax_num_cpu_devices", VIRTUAL_DEVICES)
jax.config.update("jax_numpy_rank_promotion", "raise")
if CHOOSES_FLAGS:
    jax.devices()  # jaxlib reads its flags
    os.environ["XLA_FLAGS"] = flags.COMMON

LOCAL_HOSTS = {"127.0.0.1", "::1", "localhost"}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """No workers for a single file: `--dist loadfile` would use one of them. Nor on a
    GPU or TPU, which one process has."""
    files = {argument.split("::")[0] for argument in config.args}
    single = len(files) == 1 and files.pop().endswith(".py")
    return 0 if single or not ON_CPU else None


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items):
    """Marks the slow cases."""
    for item in items:
        if any(re.search(pattern, item.nodeid) for pattern in SLOW_CASES):
            item.add_marker("slow")
            item.add_marker("repeated")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A test that reaches for another machine fails at once, and says so."""
    connect = socket.socket.connect

    def connect_locally(self, address):
        if self.family != socket.AF_UNIX and address[0] not in LOCAL_HOSTS:
            raise RuntimeError(f"a test tried to connect to {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_locally)
