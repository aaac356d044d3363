"""Layer 3: which plans are legal, candidates in a good order, the search, the store of trials."""
