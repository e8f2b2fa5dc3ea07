"""y = x @ weight.T for a weight in any format: one kernel body, with the decoder and the prologue as arguments."""
