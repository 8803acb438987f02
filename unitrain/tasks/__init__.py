"""Built-in Trainers, named in a recipe as `trainer: unitrain.tasks:LanguageModel`."""

from .classification import Classification as Classification
from .language_model import LanguageModel as LanguageModel
from .masked_language_model import MaskedLanguageModel as MaskedLanguageModel
from .sequence_classification import SequenceClassification as SequenceClassification
