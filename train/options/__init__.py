"""The options of all scripts: declared, checked, as YAML; `train.settings` reads their files."""
