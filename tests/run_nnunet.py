"""nnU-Net from raw files to a prediction with the trainer of docs/fuse_streams.md: ``python run_nnunet.py ROOT TRAINER_FOLDER``.

A process of its own, since nnU-Net takes its folders from the environment and starts processes. Prints what it saw as one
line of JSON, the last of its output.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from nifti_factory import blobs, write_nifti
from torch import Tensor, nn

DATASET, SIDE, CASES, CLASSES = "Dataset001_Blobs", 32, 4, 3
HELD: list[torch.library.Library] = []


def main(root: Path, trainers: Path) -> dict[str, Any]:
    """Fingerprint, plan, preprocess, train, validate, resume, predict; what was seen on the way."""
    os.environ.update(nnUNet_raw=str(root / "raw"), nnUNet_preprocessed=str(root / "preprocessed"),
                      nnUNet_results=str(root / "results"), nnUNet_extTrainer=str(trainers), nnUNet_def_n_proc="1",
                      nnUNet_n_proc_DA="1")  # the planner takes no 0
    write_raw(root / "raw" / DATASET)
    let_torchvision_be_imported()
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess

    extract_fingerprints([1], num_processes=1, show_progress_bar=False)
    plan_experiments([1])
    preprocess([1], configurations=("3d_fullres",), num_processes=(1,), show_progress_bar=False)
    split = [{"train": [f"case{i}" for i in range(CASES - 1)], "val": [f"case{CASES - 1}"]}]
    (root / "preprocessed" / DATASET / "splits_final.json").write_text(json.dumps(split))
    os.environ.update(nnUNet_n_proc_DA="0")  # augment in this process

    from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint

    def trainer_of(continue_training: bool = False) -> Any:
        return get_trainer_from_args("1", "3d_fullres", 0, "nnUNetTrainerDropGen", continue_training=continue_training,
                                     device=torch.device("cpu"))

    trainer = trainer_of()
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 1, 3, 1
    trainer.initialize()
    before = {key: value.clone() for key, value in trainer.network.state_dict().items()}
    seen = watch(trainer.network.network)
    trainer.run_training()
    after = trainer.network.state_dict()
    trainer.perform_actual_validation()

    resumed = trainer_of(continue_training=True)
    maybe_load_checkpoint(resumed, continue_training=True, validation_only=False)
    return {
        "patch": list(trainer.configuration_manager.patch_size), "seen": seen,
        "trained": [key for key in before if not torch.equal(before[key], after[key])], "keys": list(after),
        "optimized": sum(len(group["params"]) for group in trainer.optimizer.param_groups),
        "resumed_epoch": resumed.current_epoch,
        "resumed_equal": all(torch.equal(value, resumed.network.state_dict()[key]) for key, value in after.items()),
        "results": trainer.output_folder_base, "refuses_2d": refusal_of_2d(trainer),
        "compiled_equal": compiled_equals_eager(trainer.network),
        "predictions": [predict(root, trainer.output_folder_base, f"predictions{i}") for i in range(2)],
    }


def write_raw(folder: Path) -> None:
    """A data set in nnU-Net's raw format; the last case has no label and is to be predicted."""
    for i in range(CASES + 1):
        image, label = blobs((SIDE, SIDE, SIDE), CLASSES, seed=i)
        kind = "Tr" if i < CASES else "Ts"
        write_nifti(folder / f"images{kind}" / f"case{i}_0000.nii.gz", image, np.eye(4))
        if kind == "Tr":
            write_nifti(folder / "labelsTr" / f"case{i}.nii.gz", label, np.eye(4))
    labels = {"background": 0, **{f"class{c}": c for c in range(1, CLASSES)}}
    (folder / "dataset.json").write_text(json.dumps(
        {"channel_names": {"0": "MR"}, "labels": labels, "numTraining": CASES, "file_ending": ".nii.gz"}))


def let_torchvision_be_imported() -> None:
    """Looking for a trainer, nnU-Net imports all of its own; some import timm, and that torchvision.

    A torchvision built for CUDA beside a torch for the CPU does not load its operators, and its import then fails where
    it registers what they look like. Nothing here calls them; it is enough that their names exist.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        HELD.append(torch.library.Library("torchvision", "FRAGMENT"))
        for name in ("nms", "qnms"):
            HELD[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def watch(network: nn.Module) -> list[dict[str, Any]]:
    """Note every call of the network behind the fusion: mode, channels, how many are all zero, how many outputs."""
    seen: list[dict[str, Any]] = []

    def note(module: nn.Module, inputs: tuple[Tensor], output: Any) -> None:
        fused = inputs[0]
        seen.append({"training": module.training, "channels": fused.shape[1],
                     "dropped": int((fused.flatten(2) == 0).all(-1).sum()),
                     "outputs": len(output) if isinstance(output, list | tuple) else 0})

    network.register_forward_hook(note)
    return seen


def refusal_of_2d(trainer: Any) -> str:
    """What the trainer says to a 2D configuration."""
    try:
        trainer.build_network_architecture(trainer.plans_manager, trainer.plans_manager.get_configuration("2d"), 1, CLASSES)
    except ValueError as error:
        return str(error)
    return ""


def compiled_equals_eager(network: nn.Module) -> bool:
    """Whether extractor and fusion compile without a graph break, to the same result; what is behind them is nnU-Net's."""
    for module in network.modules():
        module._forward_hooks.clear()
    network.eval()
    network.network = nn.Identity()
    image = torch.randn(1, 1, SIDE, SIDE, SIDE)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    return torch.allclose(compiled(image), network(image))


def predict(root: Path, model: str, name: str) -> str:
    """Predict the case without a label from the files of a training; the file."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    (root / name).mkdir()
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(model, (0,))
    predictor.predict_from_files_sequential(str(root / "raw" / DATASET / "imagesTs"), str(root / name))
    path = root / name / f"case{CASES}.nii.gz"
    assert nib.load(path).shape == (SIDE, SIDE, SIDE)
    return str(path)


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]))))
