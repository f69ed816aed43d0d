//! Attaching bound devices (`drivers/iommu/iommufd/device.c`).

use super::ioas::Ioas;
use super::table::{Bound, Hwpt, Kind, Leftovers, Object, Table};
use crate::model::{IommuGroup, ReservedKind};
use crate::{Errno, Result};
use dma_memory::Range;
use std::sync::Arc;

impl Table {
    /// Attaches, or replaces the attachment in one step; on error the old one stays. Returns the
    /// id to write back.
    pub(super) fn attach(&mut self, id: u32, pt_id: u32, left: &mut Leftovers) -> Result<u32> {
        match self.bound(id)?.kind {
            Kind::Access { ioas } => self.attach_access(id, ioas, pt_id, left).map(|()| pt_id),
            Kind::Device { .. } => self.attach_device(id, pt_id, left),
        }
    }

    /// Ends the attachment, if there is one.
    pub(super) fn detach(&mut self, id: u32, left: &mut Leftovers) {
        let Ok(bound) = self.bound(id) else { return };
        let route = bound.port.switch(None);
        match &mut bound.kind {
            Kind::Access { ioas } => {
                if let Some(old) = ioas.take() {
                    self.leave_ioas(id, old, left);
                }
            }
            Kind::Device { hwpt, group } => {
                let group = group.group().id();
                if let Some(old) = hwpt.take() {
                    if let Ok(table) = self.hwpt(old) {
                        table.ioas.unreserve(id);
                    }
                    if let Some((_, members)) = self.groups.get_mut(&group) {
                        *members -= 1;
                        if *members == 0 {
                            self.groups.remove(&group);
                        }
                    }
                    self.release(old, 1, left);
                }
            }
        }
        left.routes.extend(route);
    }

    fn leave_ioas(&mut self, id: u32, ioas: u32, left: &mut Leftovers) {
        if let Ok(ioas) = self.ioas(ioas) {
            ioas.remove_access(id);
        }
        self.release(ioas, 1, left);
    }

    /// `iommufd_access_change_ioas`: only an IOAS will do, everything else is `ENOENT`.
    fn attach_access(
        &mut self,
        id: u32,
        old: Option<u32>,
        pt_id: u32,
        left: &mut Leftovers,
    ) -> Result {
        let new = Arc::clone(self.ioas(pt_id)?);
        if old == Some(pt_id) {
            return Ok(());
        }
        let bound = self.bound(id)?;
        new.add_access(id, bound.device.clone())?;
        bound.kind = Kind::Access { ioas: Some(pt_id) };
        left.routes.extend(bound.port.switch(Some(new)));
        self.use_object(pt_id, 1);
        if let Some(old) = old {
            self.leave_ioas(id, old, left);
        }
        Ok(())
    }

    /// `iommufd_device_change_pt`.
    fn attach_device(&mut self, id: u32, pt_id: u32, left: &mut Leftovers) -> Result<u32> {
        let ioas = match self.object(pt_id)? {
            Object::Hwpt(_) => return self.attach_hwpt(id, pt_id, left).map(|()| pt_id),
            Object::Ioas(ioas) => Arc::clone(ioas),
            Object::Bound(_) => return Err(Errno::INVAL),
        };
        let automatic: Vec<u32> = self
            .entries
            .iter()
            .filter(|(_, entry)| match &entry.object {
                Object::Hwpt(hwpt) => hwpt.auto && Arc::ptr_eq(&hwpt.ioas, &ioas),
                _ => false,
            })
            .map(|(id, _)| *id)
            .collect();
        for hwpt in automatic {
            match self.attach_hwpt(id, hwpt, left) {
                Ok(()) => return Ok(hwpt),
                // Incompatible: another may do.
                Err(Errno::INVAL) => {}
                Err(errno) => return Err(errno),
            }
        }
        let hwpt = self.add_hwpt(&ioas, true)?;
        match self.attach_hwpt(id, hwpt, left) {
            Ok(()) => Ok(hwpt),
            Err(errno) => {
                self.remove(hwpt, left);
                Err(errno)
            }
        }
    }

    /// A new page table for an IOAS. `EADDRINUSE` when a mapping is not aligned to pages, `ENOMEM`.
    pub(super) fn add_hwpt(&mut self, ioas: &Arc<Ioas>, auto: bool) -> Result<u32> {
        let index = self.take_id()?;
        ioas.add_domain()?;
        self.use_object(ioas.id(), 1);
        let ioas = Arc::clone(ioas);
        Ok(self.add(index, Object::Hwpt(Hwpt { ioas, auto })))
    }

    /// To a page table: the first member of a group decides, the others must follow (`EINVAL`).
    /// One that is attached takes its whole group along.
    fn attach_hwpt(&mut self, id: u32, hwpt: u32, left: &mut Leftovers) -> Result {
        let ioas = Arc::clone(&self.hwpt(hwpt)?.ioas);
        let bound = self.device(id)?;
        let Kind::Device {
            hwpt: old,
            group: owned,
        } = &bound.kind
        else {
            return Err(Errno::NOENT);
        };
        let old = *old;
        let group = owned.group().id();
        let reserved = reserved_ranges(owned.group());
        let Some(old) = old else {
            if self.groups.get(&group).is_some_and(|(now, _)| *now != hwpt) {
                return Err(Errno::INVAL);
            }
            ioas.reserve(id, &reserved)?;
            self.groups.entry(group).or_insert((hwpt, 0)).1 += 1;
            self.use_object(hwpt, 1);
            self.point(id, hwpt, &ioas, left);
            return Ok(());
        };
        if old == hwpt {
            return Ok(());
        }
        let former = Arc::clone(&self.hwpt(old)?.ioas);
        let members = self.attached_members(group);
        let moves = !Arc::ptr_eq(&former, &ioas);
        if moves {
            for (done, member) in members.iter().enumerate() {
                if let Err(errno) = ioas.reserve(*member, &reserved) {
                    for member in members.iter().take(done) {
                        ioas.unreserve(*member);
                    }
                    return Err(errno);
                }
            }
        }
        let count = u32::try_from(members.len()).unwrap_or(u32::MAX);
        self.groups.insert(group, (hwpt, count));
        self.use_object(hwpt, count);
        for member in &members {
            self.point(*member, hwpt, &ioas, left);
            if moves {
                former.unreserve(*member);
            }
        }
        self.release(old, count, left);
        Ok(())
    }

    fn point(&mut self, id: u32, to: u32, ioas: &Arc<Ioas>, left: &mut Leftovers) {
        if let Ok(Bound {
            port,
            kind: Kind::Device { hwpt, .. },
            ..
        }) = self.bound(id)
        {
            *hwpt = Some(to);
            let old = port.switch(Some(Arc::clone(ioas) as _));
            left.routes.extend(old);
        }
    }

    fn attached_members(&self, of: u32) -> Vec<u32> {
        let attached = |object: &Object| match object {
            Object::Bound(Bound {
                kind: Kind::Device { hwpt, group },
                ..
            }) => hwpt.is_some() && group.group().id() == of,
            _ => false,
        };
        self.entries
            .iter()
            .filter(|(_, entry)| attached(&entry.object))
            .map(|(id, _)| *id)
            .collect()
    }
}

/// What a device of the group cannot use; what can be given up is.
fn reserved_ranges(group: &IommuGroup) -> Vec<Range> {
    group
        .reserved_regions()
        .iter()
        .filter(|region| region.kind != ReservedKind::DirectRelaxable)
        .filter_map(|region| Range::new(region.start, region.last).ok())
        .collect()
}
