"""Images and their classes: a folder of files, or the handwritten digits that scikit-learn ships.

Shape suffixes: N images, C channels, S pixels a side.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Subset

from scmoe_ds.data.splits import split_ranges, split_shares
from scmoe_ds.errors import DataError, imports_of
from scmoe_ds.parallel.agreement import is_rank_zero

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger("scmoe_ds")

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
MODES = {1: "L", 3: "RGB"}
"""PIL's name of a number of channels."""
Sample = dict[str, Tensor]


class Images(Dataset[Sample]):
    """Images with their labels, by number from 0."""

    def __len__(self) -> int:
        raise NotImplementedError


@dataclass(frozen=True)
class ImageSets:
    """Training and validation images.

    Attributes:
        classes: names by label.
        fingerprint: differs when the images differ.
        no_validation: why `valid` is None.
    """

    train: Images
    valid: Images | None
    classes: tuple[str, ...]
    fingerprint: str
    no_validation: str | None = None


class Digits(Images):
    """1797 grey digits of 8 × 8 pixels, enlarged: {"images": [1, S, S] in -1 … 1, "labels": int64}.

    Raises:
        MissingPackageError: scikit-learn is missing.
    """

    classes = tuple("0123456789")
    fingerprint = "digits"

    def __init__(self, image_size: int) -> None:
        with imports_of("images", "--dataset digits"):
            from sklearn.datasets import load_digits
        found = load_digits()
        pixels_N1SS = torch.from_numpy(found.images).float().unsqueeze(1) / 8 - 1  # its values are 0 … 16
        self.images = F.interpolate(pixels_N1SS, size=(image_size, image_size), mode="bilinear", align_corners=False)
        self.labels = torch.from_numpy(found.target).long()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        return {"images": self.images[index], "labels": self.labels[index]}


class ImageFolder(Images):
    """`<directory>/<class>/<image>`, classes in alphabetical order: {"images": [C, S, S] in -1 … 1, "labels": int64}.

    An image of another size is scaled until its shorter side fits, and cut to its centre. Nothing is cached and
    nothing is random. For augmentation hand the trainer a data set of your own.

    Args:
        classes: names by label; default: the sub-directories.

    Raises:
        DataError: no such directory, no class, no image; when an image is read: not an image.
        MissingPackageError: pillow is missing.
    """

    def __init__(
        self, directory: str | Path, image_size: int, num_channels: int = 3, classes: Sequence[str] | None = None
    ) -> None:
        with imports_of("images", "a folder of images"):
            import PIL.Image  # noqa: F401
        root = Path(directory)
        if not root.is_dir():
            raise DataError(f"--data-path {root}: no such directory; it holds one sub-directory of images per class")
        self.classes = tuple(classes or sorted(each.name for each in root.iterdir() if each.is_dir()))
        if num_channels not in MODES:
            raise DataError(f"--num-channels {num_channels}: images have 1 (grey) or 3 (colours)")
        self.image_size, self.mode = image_size, MODES[num_channels]
        found = [
            (path, label)
            for label, name in enumerate(self.classes)
            for path in sorted((root / name).rglob("*"))
            if not path.is_dir()
        ]
        self.files = [(path, label) for path, label in found if path.suffix.lower() in SUFFIXES]
        left_out = [str(path) for path, _ in found if path.suffix.lower() not in SUFFIXES]
        if left_out and is_rank_zero():
            logger.warning(
                f"{len(left_out)} file(s) in {root} are left out, because their names are not those of images: "
                f"{', '.join(left_out[:10])}{', …' if len(left_out) > 10 else ''}"
            )
        if not self.files:
            raise DataError(
                f"--data-path {root}: no images in it; they are expected as {root}/<class>/<image>, "
                f"with names that end in {', '.join(SUFFIXES)}"
            )
        # Names and sizes: hashing the contents would read all images. A link to nothing is an error when it is read.
        sizes = [path.stat().st_size if path.exists() else 0 for path, _ in self.files]
        names = "\n".join(f"{path.relative_to(root)} {size}" for (path, _), size in zip(self.files, sizes, strict=True))
        self.fingerprint = hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()[:12]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        from PIL import Image

        path, label = self.files[index]
        try:
            with Image.open(path) as image:
                square = self._square(image.convert(self.mode))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{path}: cannot be read as an image ({error}); remove or replace it") from None
        pixels = torch.from_numpy(np.array(square)).float().reshape(self.image_size, self.image_size, -1)
        return {"images": pixels.permute(2, 0, 1) / 127.5 - 1, "labels": torch.tensor(label)}

    def _square(self, image: Image) -> Image:
        if image.size == (self.image_size, self.image_size):
            return image
        from PIL.Image import Resampling

        scale = self.image_size / min(image.size)
        width, height = (max(round(side * scale), self.image_size) for side in image.size)
        left, top = (width - self.image_size) // 2, (height - self.image_size) // 2
        scaled = image.resize((width, height), Resampling.BICUBIC)
        return scaled.crop((left, top, left + self.image_size, top + self.image_size))


class Part(Subset[Sample], Images):
    """Some images of a data set."""


class Epochs(Images):
    """A data set again and again. The order of an epoch depends on the seed and the epoch alone.

    A resumed run therefore continues where it stopped, and every rank sees the same order.
    """

    def __init__(self, whole: Images, num_samples: int, seed: int) -> None:
        self.whole, self.num_samples, self.seed = whole, num_samples, seed
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Sample:
        epoch, position = divmod(index, len(self.whole))
        if self._order[0] != epoch:
            self._order = (epoch, shuffled(len(self.whole), self.seed, epoch + 1))
        return self.whole[self._order[1][position]]


class Padded(Images):
    """A data set with images of the label `ignored` added, up to a multiple of the ranks' batches."""

    def __init__(self, whole: Images, multiple: int, ignored: int) -> None:
        self.whole, self.ignored = whole, ignored
        self.num_samples = -(-len(whole) // multiple) * multiple

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Sample:
        if index < len(self.whole):
            return self.whole[index]
        return {**self.whole[0], "labels": torch.tensor(self.ignored)}


def shuffled(count: int, seed: int, epoch: int) -> list[int]:
    """A permutation of range(count) for each seed and epoch; epoch 0 is the split's."""
    return [int(number) for number in np.random.default_rng((seed, epoch)).permutation(count)]


def split_in_two(whole: Images, split: str, seed: int, source: str) -> tuple[Part, Part | None]:
    """Training and validation images, drawn at random by the seed in the shares of `split`; None for a share of 0.
    Raises a DataError if the split is invalid or leaves either part empty."""
    order = shuffled(len(whole), seed, 0)
    train, valid, _ = (Part(whole, [order[place] for place in places]) for places in split_ranges(split, len(order)))
    if len(train) and not split_shares(split)[1]:
        return train, None
    if not len(train) or not len(valid):
        raise DataError(
            f"--split {split} of the {len(order)} images of {source} leaves none for "
            f"{'validation' if len(train) else 'training'}; change it, or add images"
        )
    return train, valid


def _divided(whole: Digits | ImageFolder, split: str, seed: int, source: str) -> ImageSets:
    train, valid = split_in_two(whole, split, seed, source)
    reason = f"--split {split} leaves no share for it" if valid is None else None
    return ImageSets(train, valid, whole.classes, whole.fingerprint, reason)


def load_images(
    directory: str | None, dataset: str, image_size: int, num_channels: int, num_classes: int, split: str, seed: int
) -> ImageSets:
    """
    Args:
        directory: of an image folder. When it has sub-directories train and val, they are the two parts. When train is
            its only one, there is no validation. Otherwise `split` divides the images.
        dataset: "folder" or "digits".

    Raises:
        DataError: images that cannot be found or divided, or more classes than the model has.
    """
    if dataset == "digits":
        if num_channels != 1:
            raise DataError(f"--num-channels {num_channels}: the digits are grey; use 1")
        sets = _divided(Digits(image_size), split, seed, "the digits")
    elif directory is None:
        raise DataError("--data-path is missing: name a directory of images, or use --dataset digits")
    else:
        sets = _in_directory(Path(directory), image_size, num_channels, split, seed)
    if len(sets.classes) > num_classes:
        raise DataError(
            f"{len(sets.classes)} classes in {directory or dataset}, but --num-classes {num_classes}; "
            f"set --num-classes {len(sets.classes)}"
        )
    return sets


def _in_directory(root: Path, image_size: int, num_channels: int, split: str, seed: int) -> ImageSets:
    has_validation = (root / "val").is_dir()
    children = {each.name for each in root.glob("*/")}
    if "train" not in children or (len(children) > 1 and not has_validation):
        return _divided(ImageFolder(root, image_size, num_channels), split, seed, str(root))
    train = ImageFolder(root / "train", image_size, num_channels)
    if not has_validation:
        return ImageSets(train, None, train.classes, train.fingerprint, f"{root} has train/ but no val/")
    valid = ImageFolder(root / "val", image_size, num_channels, train.classes)
    return ImageSets(train, valid, train.classes, train.fingerprint)
