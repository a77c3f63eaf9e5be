"""Shared fixtures: a command line to type into, trained weights, images, a saved result."""

import archscan  # noqa: F401 - first: it declares what torchvision needs before anything imports torchvision

# isort: split

import os
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread for each of several processes, and for those that they start
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

ROOT = Path(__file__).parent.parent
LENET_EPOCHS = 6


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    code: int
    out: str
    err: str


@pytest.fixture
def typed(capsys, monkeypatch, tmp_path):
    """Type a command into the command line, in this process and in an empty folder."""
    from archscan.cli import main

    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()

    def run(*arguments):
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        streams = capsys.readouterr()
        return Ran(code, streams.out, streams.err)

    yield run
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def lenet5_file(tmp_path_factory):
    """Weights of LeNet-5 after some seconds of training on the digits."""
    from safetensors.torch import save_file

    from archscan.data import calibration_images
    from archscan.sources import open_subject
    from scripts.train_lenet import train

    subject = open_subject("lenet5", weights="random")
    images = calibration_images("digits", subject.preprocessing, samples=1297, batch_size=64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        train(subject.model, images, LENET_EPOCHS, learning_rate=2e-3)
    file = tmp_path_factory.mktemp("weights") / "lenet5.safetensors"
    save_file(subject.model.state_dict(), file)
    return file


@pytest.fixture(scope="session")
def _slim_lenet5(tmp_path_factory, lenet5_file):
    from archscan.cli import main

    folder = tmp_path_factory.mktemp("saved") / "slim"
    typed = f"lenet5 --weights {lenet5_file} --data digits --samples 64 --target-flops 0.5 --output {folder} --quiet"
    assert main(typed.split()) == 0
    return folder


@pytest.fixture
def saved(tmp_path, _slim_lenet5):
    """A saved result, slimmed from `lenet5_file`; a copy that a test may spoil."""
    return Path(shutil.copytree(_slim_lenet5, tmp_path / "saved"))


@pytest.fixture(scope="session")
def data_folder():
    """Real images and trained weights, where they are at hand."""
    folder = Path(os.environ.get("ARCHSCAN_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "resnet20_cifar10.safetensors").is_file():
        pytest.skip(f"NO REAL DATA in {folder}: set ARCHSCAN_DATA to the folder of CIFAR-10 and its ResNets")
    return folder


@pytest.fixture(scope="session")
def cifar_zip(tmp_path_factory, data_folder):
    """Twenty test images of each class."""
    small = tmp_path_factory.mktemp("cifar") / "cifar.zip"
    with zipfile.ZipFile(data_folder / "cifar10-val.zip") as whole, zipfile.ZipFile(small, "w") as part:
        names = sorted(name for name in whole.namelist() if not name.endswith("/"))
        for name in names[::25]:
            part.writestr(name, whole.read(name))
    return small
