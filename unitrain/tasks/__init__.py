"""Built-in Trainers, named in a recipe as `trainer: unitrain.tasks:LanguageModel`."""

from .classification import Classification as Classification
from .language_model import LanguageModel as LanguageModel
