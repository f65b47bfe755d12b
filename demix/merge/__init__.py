"""Parameters into parameters, leaf by leaf. (Adding an expert to a set is demix/lifecycle, mixing
what experts say is demix/mix.)"""
