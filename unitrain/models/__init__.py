"""Built-in models: options without a framework in config.py, one file for each framework and model beside it."""
