"""What texts have in common: leakage, vocabulary, exact and near duplicates."""
