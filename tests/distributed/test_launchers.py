"""The configuration files of `accelerate launch`: this version reads them, knows all they say, and none is a recipe."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from hf_tfamily.recipes import RecipeError, list_recipes, load_recipe

FOLDER = Path(__file__).parents[2] / "configs" / "accelerate"
ENGINES = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "fsdp2_tp": "FSDP", "deepspeed_zero3": "DEEPSPEED"}


@pytest.mark.parametrize("name", ENGINES)
def test_accelerate_reads_it(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert config.distributed_type == ENGINES[name]
    assert config.num_processes > 1
    known = vars(launch_command_parser().parse_args(["script.py"]))
    for section in (config.fsdp_config, config.deepspeed_config, config.parallelism_config):
        assert section.keys() <= known.keys()
    assert config.fsdp_config.get("fsdp_version", 2) == 2


def test_each_file_is_tested():
    assert {path.stem for path in FOLDER.iterdir()} == ENGINES.keys()


def test_none_is_a_recipe():
    assert not [name for name in list_recipes() if name.startswith("accelerate")]
    with pytest.raises(RecipeError, match="No recipe"):
        load_recipe("accelerate/ddp")
