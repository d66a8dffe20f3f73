"""The sections of params.yaml: data. Here, and nowhere else, a key has a default: where a reader can do without it.

So `{reader: auto, path: letters}` is a whole section. What is left out is no part of what DVC records of params.yaml
(model_dump(exclude_unset=True)), and readers get all: so `prepare` depends on this file.
"""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

from stages.pipeline.params.wording import short

DatasetName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]+$", max_length=64)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Text = Annotated[str, StringConstraints(min_length=1)]
PictureSize = Annotated[int, Field(ge=8, le=512)]  # pixels a side


class Section(BaseModel):
    """One section of params.yaml: strict types, finite numbers, no unknown keys, never changed after it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _with_one_group(pattern: str) -> str:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"{short(pattern)} is no regular expression: {error}") from None
    if groups != 1:
        raise ValueError(f"{short(pattern)} must have one group, in brackets, not {groups}")
    return pattern


class MnistData(Section):
    """The four IDX files of MNIST."""

    reader: Literal["mnist"]
    size: Literal[28] = 28
    path: str | None = None  # it is downloaded


class GlyphsData(Section):
    """Persian digits and letters drawn as hands write them."""

    reader: Literal["glyphs"]
    size: Annotated[int, Field(ge=16, le=256)]
    train_images: Count
    validation_images: Count
    test_images: Count
    seed: Seed


class _Divided(Section):
    """What is common to readers that divide images by a hash."""

    validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.15
    test_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    seed: Seed = 0

    @model_validator(mode="after")
    def _some_are_left_to_train_on(self) -> "_Divided":
        if self.validation_share + self.test_share >= 1:
            raise ValueError(
                f"validation_share = {self.validation_share:g} and test_share = {self.test_share:g} must be less than 1 together"
            )
        return self


class _Pictures(_Divided):
    """What is common to readers of image files."""

    licence: Text = "unknown"
    invert: bool = False
    pad: bool = False
    group: Annotated[str, AfterValidator(_with_one_group)] | None = None
    strict: bool = False


class ArchiveData(_Pictures):
    """Image files named LABEL.anything.png, in a zip or a folder; from a path, a URL or a Google Drive id."""

    reader: Literal["archive"]
    size: PictureSize
    path: Text | None = None
    url: Annotated[str, StringConstraints(pattern="^https?://")] | None = None
    drive: Text | None = None
    sha256: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")] | None = None  # whatever it is

    @model_validator(mode="after")
    def _one_way(self) -> "ArchiveData":
        if sum(way is not None for way in (self.path, self.url, self.drive)) > 1:
            raise ValueError("only one of path, url and drive can be given; set the others to null")
        return self


class FolderData(_Pictures):
    """A folder of images: a sub-folder for each class, or flat and without labels."""

    reader: Literal["folder"]
    path: Text
    size: PictureSize


class AutoData(_Pictures):
    """A folder or a zip of images: a sub-folder for each class, files named LABEL.anything.png, or flat and without labels."""

    reader: Literal["auto"]
    path: Text
    size: PictureSize | None = None  # chosen by the pictures
    pad: bool = True


class HodaData(_Divided):
    """The .cdb files of the Hoda digits."""

    reader: Literal["hoda"]
    path: Text | None = None  # where the section is not swept
    size: Annotated[int, Field(ge=16, le=256)]


class MixData(Section):
    """Several datasets as one; classes of one name become one class."""

    reader: Literal["mix"]
    of: Annotated[dict[DatasetName, "PlainSection"], Field(min_length=2)]

    @property
    def size(self) -> int | None:
        """Pixels a side, the same in all of them."""
        return next(iter(self.of.values())).size

    @model_validator(mode="after")
    def _one_size(self) -> "MixData":
        sizes = {name: section.size for name, section in self.of.items()}
        if chosen := [name for name, size in sizes.items() if size is None]:
            raise ValueError(f"all datasets of a mix need one size; say that of {', '.join(chosen)}")
        if len(set(sizes.values())) > 1:
            raise ValueError(f"all datasets of a mix need one size, not {', '.join(f'{n}: {s}' for n, s in sizes.items())}")
        return self


PlainSection = Annotated[MnistData | GlyphsData | HodaData | ArchiveData | FolderData | AutoData, Field(discriminator="reader")]
DataSection = Annotated[
    MnistData | GlyphsData | HodaData | ArchiveData | FolderData | AutoData | MixData, Field(discriminator="reader")
]
SECTIONS = (MnistData, GlyphsData, HodaData, ArchiveData, FolderData, AutoData, MixData)
