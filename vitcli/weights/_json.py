"""What is said in JSON beside the weights, checked: whatever project wrote it, one line says what is wrong."""

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vitcli.errors import CheckpointError

Side = Annotated[int, Field(gt=0, le=4096)]  # pixels; a position table stretched beyond would fill the memory
Mean = tuple[float, float, float]
Positive = Annotated[float, Field(gt=0)]
Std = tuple[Positive, Positive, Positive]

AnySchema = TypeVar("AnySchema", bound=BaseModel)


def checked(schema: type[AnySchema], found: dict[str, Any], file: str) -> AnySchema:
    """An object of a JSON file, in which null is the same as nothing. Raises CheckpointError with the first mistake."""
    try:
        return schema.model_validate({key: value for key, value in found.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        place = ascii(".".join(map(str, first["loc"])))[1:-1][:80]
        raise CheckpointError(f"{file}: {place + ': ' if place else ''}{first['msg']}") from error


class Pixels(BaseModel):
    """The keys of data.Preprocessing."""

    model_config = ConfigDict(allow_inf_nan=False)

    res: tuple[Side, Side]
    resize: Side | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic", "area"]
    antialias: bool = True
    mean: Mean
    std: Std

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.resize and self.resize < max(self.res):
            raise ValueError(f"a shorter side of {self.resize} is too little for a crop of {max(self.res)}")
        return self
