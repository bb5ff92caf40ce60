"""The frozen blocks below all that is trained: their output is computed once for each row and read from disk after."""
