"""The plug-in for lmms-eval (0.7.3 and newer): ``lmms_eval --model slow_fast --model_args pretrained=DIRECTORY``.

lmms-eval asks every installed package for models through the entry points ``lmms_eval.models`` (pyproject.toml). It
loads this module whichever model it is told to run, so nothing is imported here before it asks.
"""


def manifest():
    """What lmms-eval registers: the name, and the class of ``model``, which is imported when the name is asked for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("slow_fast", chat_class_path=f"{__name__}.model.SlowFast")
