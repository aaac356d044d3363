"""How work is counted: formulas, fakes, and the recorder that sees every operator."""
