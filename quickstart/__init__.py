"""`dsv3 quickstart`: the whole way at laptop size, from the files of this machine to a model that reasons."""
