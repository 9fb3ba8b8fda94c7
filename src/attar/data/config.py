"""What a recipe's `data` key holds: where examples come from and how they are prepared."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_serializer,
    model_validator,
)

Color = Literal["gray", "rgb"]
Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]


class Columns(BaseModel):
    """Which columns of a table hold the image and its label."""

    model_config = ConfigDict(extra="forbid")

    image: str | None = None
    label: str | None = None


class Normalize(BaseModel):
    """Per-channel mean and standard deviation of pixels scaled to 0–1. One value serves all."""

    model_config = ConfigDict(extra="forbid")

    mean: list[float] = Field(min_length=1)
    std: list[Annotated[float, Field(gt=0)]] = Field(min_length=1)


class Subset(BaseModel):
    """A part of the training split to learn from; validation and test stay whole.

    Exactly one of `count` and `fraction`. `stratified` keeps the classes' shares.
    """

    model_config = ConfigDict(extra="forbid")

    count: Positive | None = None
    fraction: Fraction | None = None
    method: Literal["stratified", "random"] = "stratified"

    @model_validator(mode="after")
    def _one_amount(self) -> Subset:
        if (self.count is None) == (self.fraction is None):
            raise ValueError("a subset has either a `count` or a `fraction`")
        return self


class Validation(BaseModel):
    """Where choices are made: a stratified part of `train`, or of `test` (the rest reports).

    fraction: of the split it is taken from; default: a tenth of train, half of test.
    """

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    from_: Literal["train", "test"] = Field(default="train", alias="from")
    fraction: Fraction | None = None

    @property
    def share(self) -> float:
        """The fraction, or the default of where it is taken from."""
        return self.fraction or (0.1 if self.from_ == "train" else 0.5)

    @model_serializer
    def _written(self) -> dict[str, Any]:
        return {"from": self.from_, "fraction": self.share}


def bare_amount(written: Any) -> Any:
    """A bare number as the settings it stands for: `{count: …}`, or `{fraction: …}` for a float."""
    if isinstance(written, int) and not isinstance(written, bool):
        return {"count": written}
    if isinstance(written, float):
        return {"fraction": written}
    return written


class DataConfig(BaseModel):
    """A data set, ready to be loaded by `attar.data.load_data`.

    source: a data source's name (`attar list sources`) or `path/to/file.py:Name`.
    name: torchvision's class, or the data set's name on the Hugging Face hub.
    root: torchvision's folder. path: the file or folder of every other source. Both may hold
        variables, as in `${DATA}/photos`.
    download: whether torchvision may fetch a data set that `root` lacks.
    arguments: handed to torchvision's class, the hub's `load_dataset`, or your own source.
    classes: names in the order of the labels, where the data have none or worse ones.
    size: n: images are cut to a centred square and scaled to n × n. [height, width]: they are
        stretched to it. null: as they are, all alike.
    color: what images are turned into; null: as they are.
    augment: torchvision's v2 transforms by their names in snake_case, for training only.
    normalize: `auto` computes mean and standard deviation from the training split.
    unlabelled: images without labels, for `distill` to learn from besides the training split: a
        folder of images at any depth, a .npz or .npy file of one array, or Parquet.
    seed: draws the splits. It is not the run's, so that runs with other seeds choose and report on
        the same examples.

    Example:
        >>> config = DataConfig.model_validate({
        ...     "source": "torchvision", "name": "CIFAR10", "root": "data",
        ...     "augment": [{"random_crop": {"size": 32, "padding": 4}}, "random_horizontal_flip"],
        ... })
        >>> config.normalize
        'auto'
    """

    model_config = ConfigDict(extra="forbid")

    source: str
    name: str | None = None
    root: str | None = None
    path: str | None = None
    columns: Columns | None = None
    download: bool = False
    arguments: dict[str, Any] = Field(default_factory=dict)
    classes: list[str] | None = None
    size: Positive | tuple[Positive, Positive] | None = None
    color: Color | None = None
    augment: list[str | dict[str, dict[str, Any] | None]] = Field(default_factory=list)
    normalize: Normalize | Literal["auto"] = "auto"
    subset: Subset | None = None
    validation: Validation | None = None
    unlabelled: str | None = None
    seed: int = Field(0, ge=0, lt=2**32)

    @field_validator("augment")
    @classmethod
    def _one_name_each(cls, augment: list[Any]) -> list[Any]:
        for step in augment:
            if isinstance(step, dict) and len(step) != 1:
                raise ValueError(
                    "each entry of `augment` is one transform, such as "
                    "`- random_crop: {size: 32, padding: 4}`"
                )
        return augment

    @field_validator("subset", mode="before")
    @classmethod
    def _bare_amount(cls, subset: Any) -> Any:
        return bare_amount(subset)
