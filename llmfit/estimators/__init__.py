"""The estimators: thin classes over one mechanism."""

from llmfit.estimators.auto import LLMEstimator
from llmfit.estimators.classifier import LLMClassifier
from llmfit.estimators.generator import LLMGenerator
from llmfit.estimators.regressor import LLMRegressor

__all__ = ["LLMClassifier", "LLMEstimator", "LLMGenerator", "LLMRegressor"]
