"""The TroL models: configuration, model, processor, presets, opening; imports `data` and lower.

Importing this package registers them: `AutoModelForImageTextToText.from_pretrained(folder)`,
`AutoProcessor.from_pretrained(folder)` and `pipeline("image-text-to-text", ...)` work after it.
"""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

# From its own module: before transformers 5.2x the other name wants torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from trol.family.configuration import TrolConfig
from trol.family.internlm2 import InternLM2Config, InternLM2Model
from trol.family.loading import register_saved_hosts
from trol.family.modeling import TrolForConditionalGeneration, TrolModel
from trol.family.presets import tiny, tiny_processor, word_tokenizer
from trol.family.processing import TrolProcessor
from trol.family.published.processors import SquareImageProcessor, TiledImageProcessor

AutoConfig.register(InternLM2Config.model_type, InternLM2Config)
AutoModel.register(InternLM2Config, InternLM2Model)
AutoConfig.register(TrolConfig.model_type, TrolConfig)
AutoModel.register(TrolConfig, TrolModel)
AutoModelForImageTextToText.register(TrolConfig, TrolForConditionalGeneration)
AutoProcessor.register(TrolConfig, TrolProcessor)
register_saved_hosts()
# One entry for each: of several classes in one entry, transformers opens the first by any name.
AutoImageProcessor.register(InternLM2Config, image_processor_classes={"pil": SquareImageProcessor})
AutoImageProcessor.register(TrolConfig, image_processor_classes={"pil": TiledImageProcessor})

__all__ = [
    "InternLM2Config",
    "InternLM2Model",
    "TrolConfig",
    "TrolForConditionalGeneration",
    "TrolModel",
    "TrolProcessor",
    "tiny",
    "tiny_processor",
    "word_tokenizer",
]
