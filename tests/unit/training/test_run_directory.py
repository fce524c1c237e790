"""An earlier run in the directory is continued or put aside, never mixed with a new one."""

import json

import pytest

from mqat.config import load_config
from mqat.export.exporters import EXPORTERS
from mqat.training.run_directory import open_run_directory


def config(**exp_manager):
    return load_config(None, [f"exp_manager.{key}={value}" for key, value in exp_manager.items()])


def finished_run(directory, **summary):
    summary = {"finished": True} | summary
    open_run_directory(directory, config())
    (directory / "checkpoints" / "step_00000004").mkdir()
    (directory / "metrics.jsonl").write_text("{}\n")
    (directory / "quality").mkdir()
    (directory / "summary.json").write_text(json.dumps({"done": ["qat"], "seconds": 7.0} | summary))


def test_a_new_run_moves_an_earlier_one_aside_whole(tmp_path):
    finished_run(tmp_path)
    (tmp_path / "thesis.txt").write_text("years of work")
    assert open_run_directory(tmp_path, config())[0]["done"] == []
    assert (tmp_path / "thesis.txt").is_file()  # not a file of a run: it stays
    assert {f.name for f in (tmp_path / "run_0").iterdir()} == {
        "config.yaml", "checkpoints", "metrics.jsonl", "summary.json", "quality",
    }  # fmt: skip
    assert (tmp_path / "run_0" / "checkpoints" / "step_00000004").is_dir()
    assert list((tmp_path / "checkpoints").iterdir()) == []
    open_run_directory(tmp_path, config(resume_if_exists="false"))
    assert (tmp_path / "run_0").is_dir() and (tmp_path / "run_1").is_dir()


def test_what_any_exporter_wrote_is_moved_aside_too(tmp_path):
    finished_run(tmp_path)
    names = {target.output_name for target in EXPORTERS}
    for name in names:
        (tmp_path / name).mkdir()
    open_run_directory(tmp_path, config())
    assert names <= {f.name for f in (tmp_path / "run_0").iterdir()}
    assert not [name for name in names if (tmp_path / name).exists()]


def test_an_interrupted_run_with_the_same_settings_goes_on_unasked(tmp_path):
    finished_run(tmp_path, finished=False)
    summary, said = open_run_directory(tmp_path, config(checkpoint_interval=3))
    assert summary["done"] == ["qat"] and "going on with the run that was interrupted" in said[0]
    other = load_config(
        None, ["model.optim.lr=0.5"]
    )  # control: a run with other settings is put aside
    summary, said = open_run_directory(tmp_path, other)
    assert summary["done"] == [] and "the earlier run is in run_0/ now" in said[0]
    summary, said = open_run_directory(
        tmp_path, load_config(None, ["model.optim.lr=0.5", "exp_manager.resume_if_exists=false"])
    )
    assert "run_1/" in said[0]


@pytest.mark.parametrize("key", ["model.restore_from_path", "model.data.train"])
def test_a_run_does_not_move_away_what_it_starts_from(tmp_path, key):
    finished_run(tmp_path)
    path = tmp_path / "checkpoints" / "step_00000004"
    value = f"[{path}]" if key.endswith("train") else path
    with pytest.raises(ValueError, match=rf"{key}=.*belongs to the earlier run"):
        open_run_directory(tmp_path, load_config(None, [f"{key}={value}"]))
    assert path.is_dir() and not (tmp_path / "run_0").exists()


def test_a_resumed_run_goes_on_from_its_summary(tmp_path):
    finished_run(tmp_path)
    summary, changes = open_run_directory(tmp_path, config(resume_if_exists="true"))
    assert summary["done"] == ["qat"] and summary["seconds_before"] == 7.0
    assert changes == []
    assert (tmp_path / "checkpoints" / "step_00000004").is_dir()
    assert not (tmp_path / "run_0").exists()


def test_a_resumed_run_may_change_its_layout_but_not_its_learning_rate(tmp_path):
    finished_run(tmp_path)
    resume = "exp_manager.resume_if_exists=true"
    open_run_directory(tmp_path, load_config(None, [resume, "model.tensor_model_parallel_size=2"]))
    other = load_config(None, [resume, "model.optim.lr=0.5"])
    with pytest.raises(ValueError, match=r"had model\.optim\.lr=1e-05, this one has 0\.5"):
        open_run_directory(tmp_path, other)


@pytest.mark.parametrize("architecture_first", [True, False])
def test_a_model_that_has_changed_its_kind_of_source_is_not_resumed(tmp_path, architecture_first):
    own, packaged = "model.architecture={hidden_size: 64}", "model.packaged=smollm2"
    first, then = (own, packaged) if architecture_first else (packaged, own)
    open_run_directory(tmp_path, load_config(None, [first]))
    with pytest.raises(ValueError, match=r"had model\.(architecture\.|packaged)"):
        open_run_directory(tmp_path, load_config(None, [RESUME, then]))
    # alone, without the other key, too
    with pytest.raises(ValueError, match=r"had model\.(architecture|packaged)"):
        open_run_directory(tmp_path, load_config(None, [RESUME]))
    open_run_directory(tmp_path, load_config(None, [RESUME, first]))  # control


def test_recomputation_may_change_when_a_run_goes_on(tmp_path):
    finished_run(tmp_path)
    layers = "model.activations_checkpoint_num_layers=2"
    open_run_directory(tmp_path, load_config(None, [RESUME, layers]))


def test_a_damaged_summary_is_named(tmp_path):
    finished_run(tmp_path)
    (tmp_path / "summary.json").write_text('{"done": [')
    with pytest.raises(ValueError, match=r"summary\.json: damaged"):
        open_run_directory(tmp_path, config(resume_if_exists="true"))


def state(directory, phase, step):
    """An optimizer state, as far as the run directory looks at it."""
    path = directory / "checkpoints" / phase / f"step_{step:08d}"
    path.mkdir(parents=True)
    (path / "mqat.json").write_text("{}")


RESUME = "exp_manager.resume_if_exists=true"
LONGER = "trainer.max_steps=200"


@pytest.mark.parametrize("phase", ["qat", "sft"])
def test_more_steps_reopen_what_was_finished_under_a_constant_rate(tmp_path, phase):
    constant = "model.optim.sched.name=constant"
    open_run_directory(tmp_path, load_config(None, [constant]))
    summary = {"done": ["ptq", "qat"], "tokens": {"pretrain": 8, phase: 64}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "checkpoints" / phase / "step_00000050").mkdir(parents=True)  # not whole
    with pytest.raises(ValueError, match=f"{phase} is finished and left no optimizer state"):
        open_run_directory(tmp_path, load_config(None, [RESUME, LONGER, constant]))
    state(tmp_path, phase, 100)
    with pytest.raises(ValueError, match=r"had trainer\.max_steps=100, this one has 50\. Restore the "
                                         r"setting, or start"):  # fmt: skip
        open_run_directory(tmp_path, load_config(None, [RESUME, "trainer.max_steps=50", constant]))
    summary, changes = open_run_directory(tmp_path, load_config(None, [RESUME, LONGER, constant]))
    left = ["ptq"] if phase == "qat" else ["ptq", "qat"]
    assert summary["done"] == left
    assert changes == ["resumed with trainer.max_steps=200, it was 100"]
    assert json.loads((tmp_path / "summary.json").read_text())["done"] == left  # if killed now


def test_a_cosine_is_stretched_only_if_the_user_says_so(tmp_path):
    finished_run(tmp_path)
    with pytest.raises(ValueError, match=r"exp_manager\.resume_changes=\[trainer\.max_steps\]"):
        open_run_directory(tmp_path, load_config(None, [RESUME, LONGER]))
    named = "exp_manager.resume_changes=[trainer.max_steps]"
    _, changes = open_run_directory(tmp_path, load_config(None, [RESUME, LONGER, named]))
    assert "as if the run had had so many steps from its start" in changes[-1]


def test_moved_data_is_named_by_the_user_and_said(tmp_path):
    here, there = "model.data.train=[here.txt]", "model.data.train=[there.txt]"
    open_run_directory(tmp_path, load_config(None, [here]))
    with pytest.raises(ValueError, match=r"resume_changes=\[model\.data\.train\]"):
        open_run_directory(tmp_path, load_config(None, [RESUME, there]))
    named = "exp_manager.resume_changes=[model.data.train]"
    _, changes = open_run_directory(tmp_path, load_config(None, [RESUME, there, named]))
    assert changes == ["resumed with model.data.train=['there.txt'], it was ['here.txt']"]
    with pytest.raises(ValueError, match=r"'model\.optim\.betas' is not one of"):
        load_config(None, [RESUME, "exp_manager.resume_changes=[model.optim.betas]"])
    with pytest.raises(ValueError, match=r"resume_changes needs exp_manager\.resume_if_exists"):
        load_config(None, [named])
