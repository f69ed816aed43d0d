//! Interrupts of a PCI function: INTx, MSI, MSI-X, ERR and REQ (`drivers/vfio/pci/vfio_pci_intrs.c`).
