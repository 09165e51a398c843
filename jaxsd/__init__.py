"""Strong image models from little data: data, views, models, objectives, train steps, stages, recipes, reports."""

__version__ = "0.1.0"
