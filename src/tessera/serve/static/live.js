"use strict";
// Every few seconds: what is marked as live is replaced by what the server says now, where it
// differs. Forms are left alone; if what they act upon has changed, a notice says so.
const show = (id, on) => { document.getElementById(id).hidden = !on; };

async function look() {
  if (document.hidden) return;
  const answer = await fetch(location.href, { headers: { "X-Live": "1" }, cache: "no-store" });
  if (answer.status === 401) return location.reload();
  if (!answer.ok) throw new Error(answer.status);
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  for (const old of document.querySelectorAll("[data-live]")) {
    const now = fresh.getElementById(old.id);
    if (now && !old.isEqualNode(now)) old.replaceWith(document.adoptNode(now));
  }
  show("changed", fresh.body.dataset.state !== document.body.dataset.state);
  show("lost", false);
}

setInterval(() => look().catch(() => show("lost", true)), 5000);
