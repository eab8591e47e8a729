"""Every error lrcompile raises on purpose. Each message says what is wrong and what to do about it."""

from __future__ import annotations


class LrcompileError(Exception):
    """The base of them all."""


class RecipeError(LrcompileError, ValueError):
    """What was asked for makes no sense, whatever the model."""


class CaptureError(LrcompileError, RuntimeError):
    """The model could not be traced with these example inputs."""


class PlanError(LrcompileError, ValueError):
    """What was asked for can't be had from this model, or the Plan belongs to another one."""


class PassError(LrcompileError, RuntimeError):
    """A graph pass broke its promise; the message carries its name."""


class AdoptError(LrcompileError, RuntimeError):
    """The model, its optimizer or its wrapper can't take the new parameters."""


class StateError(LrcompileError, RuntimeError):
    """A saved directory is truncated, altered, foreign, or of another model."""


class EvalError(LrcompileError, RuntimeError):
    """An evaluation can't start: its tasks, data or model."""


class ExportError(LrcompileError, RuntimeError):
    """A model can't be exported as asked, or an exported file can't be run."""


class MissingLibraryError(LrcompileError, ImportError):
    """An optional library is needed; the message names the extra that installs it."""


class KernelError(LrcompileError, RuntimeError):
    """A kernel was given operands, or forced on operands, that it can't take."""


class TrainError(LrcompileError, RuntimeError):
    """A training run can't start, or can't go on: its config, data or checkpoint.

    Attributes:
        everywhere: raised on all ranks alike, so that one of them may speak for all.
    """

    everywhere = False
