from ssl_ae_ksparse import KSparse

import ssl_ae

test_contract = ssl_ae.testing.contract(KSparse, k=2)
