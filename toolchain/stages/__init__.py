"""One module a stage; stages meet through artifacts only."""
