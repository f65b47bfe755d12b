"""One reader per format, behind one interface (`part.Part`); `corpus` chooses among them."""
