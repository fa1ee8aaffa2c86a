"""What all sections of a job file share. Knows no key."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the job file: frozen, and closed to keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)
